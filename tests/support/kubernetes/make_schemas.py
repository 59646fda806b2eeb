"""Makes schemas.json.gz, by which tests/unit/test_launch_files.py checks the manifests of examples/kubernetes.

The projects' published OpenAPI documents are taken from packages that carry them, all Apache-2.0:
PyTorchJob from kubeflow-training 1.9.4, JobSet v1alpha2 from kubeflow_trainer_api 2.3.0, and what stands in pods and jobs from
kubernetes-validate 1.37.0 (Kubernetes 1.34). Descriptions and whatever the two kinds do not use are left out, and keys that a
schema does not have are refused, as an API server does with strict field validation.

    pip download --no-deps kubeflow-training==1.9.4 kubeflow_trainer_api==2.3.0 kubernetes-validate==1.37.0 -d FOLDER
    for wheel in FOLDER/*.whl; do unzip -qo $wheel -d FOLDER; done
    python tests/support/kubernetes/make_schemas.py FOLDER
"""

from __future__ import annotations

import ast
import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).with_name("schemas.json.gz")
_CORE = "kubernetes_validate/kubernetes-json-schema/v1.34.0-local-strict/_definitions.json"
# Types of the generated Python code in JSON's words.
_PLAIN = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "bool": {"type": "boolean"},
    "StrictStr": {"type": "string"},
    "StrictInt": {"type": "integer"},
    "StrictBool": {"type": "boolean"},
    "datetime": {"type": "string"},
    "object": {},
    "Any": {},
}
# Kubernetes' own kinds, as the two generators name them.
_OF_CORE = {
    "V1PodTemplateSpec": "io.k8s.api.core.v1.PodTemplateSpec",
    "V1ObjectMeta": "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
    "V1Condition": "io.k8s.apimachinery.pkg.apis.meta.v1.Condition",
    "V1LabelSelector": "io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector",
    "K8sIoApiAutoscalingV2MetricSpec": "io.k8s.api.autoscaling.v2.MetricSpec",
    "Quantity": "io.k8s.apimachinery.pkg.api.resource.Quantity",
    "IoK8sApiBatchV1JobTemplateSpec": "io.k8s.api.batch.v1.JobTemplateSpec",
    "IoK8sApiCoreV1PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    "IoK8sApimachineryPkgApisMetaV1ObjectMeta": "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
    "IoK8sApimachineryPkgApisMetaV1Condition": "io.k8s.apimachinery.pkg.apis.meta.v1.Condition",
}


def make(folder: Path) -> dict[str, Any]:
    """The definitions of both kinds and of all that they refer to."""
    core = json.loads((folder / _CORE).read_text())["$defs"]
    found: dict[str, Any] = {}
    for path in sorted((folder / "kubeflow" / "training" / "models").glob("kubeflow_org_v1_*.py")):
        found.update(_read(path))
    for path in sorted((folder / "kubeflow_trainer_api" / "models").glob("jobset_v1alpha2_*.py")):
        found.update(_read(path))
    wanted, kept = ["KubeflowOrgV1PyTorchJob", "JobsetV1alpha2JobSet"], {}
    while wanted:
        name = wanted.pop()
        if name not in kept:
            kept[name] = _without_descriptions(found[name] if name in found else core[name])
            wanted += _references(kept[name])
    return dict(sorted(kept.items()))


def _read(path: Path) -> dict[str, Any]:
    """Schemas of the classes of a generated module."""
    source = path.read_text()
    return {
        node.name: _of_swagger(node, source) if "openapi_types" in source else _of_pydantic(node)
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def _of_swagger(node: ast.ClassDef, source: str) -> dict[str, Any]:
    values = {
        target.id: ast.literal_eval(line.value)
        for line in node.body
        if isinstance(line, ast.Assign)
        and isinstance(target := line.targets[0], ast.Name)
        and target.id != "discriminator"
    }
    names = values["attribute_map"]
    required = re.findall(r"Invalid value for `(\w+)`, must not be `None`", source)
    properties = {names[name]: _schema_of(written) for name, written in values["openapi_types"].items()}
    return _object(properties, [names[name] for name in required])


def _of_pydantic(node: ast.ClassDef) -> dict[str, Any]:
    properties, required = {}, []
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.value, ast.Call):
            continue
        given = {word.arg: word.value for word in line.value.keywords}
        assert isinstance(line.target, ast.Name)
        name = ast.literal_eval(given["alias"]) if "alias" in given else line.target.id
        written = ast.unparse(line.annotation)
        properties[name] = _schema_of(re.sub(r"^Optional\[(.*)\]$", r"\1", written))
        if not written.startswith("Optional["):
            required.append(name)
    return _object(properties, required)


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": sorted(set(required))} if required else schema


def _schema_of(written: str) -> dict[str, Any]:
    """Schema of a type as the generated code writes it."""
    if found := re.fullmatch(r"[Ll]ist\[(.*)\]", written):
        return {"type": "array", "items": _schema_of(found[1])}
    if found := re.fullmatch(r"(?:[Dd]ict\[\w+|dict\(str), (.*)[\])]", written):
        return {"type": "object", "additionalProperties": _schema_of(found[1])}
    if written in _PLAIN:
        return dict(_PLAIN[written])
    return {"$ref": f"#/$defs/{_OF_CORE.get(written, written)}"}


def _without_descriptions(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_descriptions(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": schema["$ref"]}
    return {k: _without_descriptions(v) for k, v in schema.items() if k != "description" or isinstance(v, dict)}


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for part in schema:
            yield from _references(part)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref":
                yield value.split("/")[-1]
            else:
                yield from _references(value)


if __name__ == "__main__":
    text = json.dumps({"$defs": make(Path(sys.argv[1]))}, separators=(",", ":"))
    SCHEMAS.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
