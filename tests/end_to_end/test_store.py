"""A run whose checkpoints go to an S3 store: it goes on from there, bit for bit, whatever becomes of its folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_longpo.checkpoint.remote import CACHE_VARIABLE, complete_steps
from megatron_longpo.runtime.status import read_status
from tests.end_to_end.test_faults_training import error_of, train
from tests.support.data import make_data
from tests.support.launch import PYTHON, command, environment, run, torchrun
from tests.support.models import make_model
from tests.support.runs import assert_same_tensors, metrics_of
from tests.support.s3 import BUCKET, SECRET, S3Server

URL = f"s3://{BUCKET}/runs/one"
STEPS = 6


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", folder / "hf", num_hidden_layers=2)
    run(command("convert", "import", hf=folder / "hf", output=folder / "ckpt", no_verify=True))
    make_data(folder / "data", 6, longest=60)
    return folder


def test_a_run_goes_on_from_its_store_bit_for_bit(model: Path, server: S3Server, tmp_path: Path) -> None:
    output, said = tmp_path / "run", ""
    env = environment(**server.env, **{CACHE_VARIABLE: str(tmp_path / "cache")})
    flags = ("--train-iters", str(STEPS))
    uploading = train(model, output, *flags, "--upload-to", URL, "--keep-last", "2", "--upload-retry-minutes", "1e-3")

    def stored() -> list[int]:
        return complete_steps(key.removeprefix("runs/one/") for key in server.names())

    # A store that takes no weights: the run ends with the cause, its checkpoint is here, and nothing there counts as one.
    server.refused = ".distcp"
    done = run([PYTHON, *uploading, "--exit-interval", "1"], env=env, expect=2)
    line = error_of(done.stderr)
    assert "step 1 is saved but not uploaded: " in line and "Service Unavailable" in line, line
    assert stored() == [] and (output / "iter_0000001").is_dir() and read_status(output).state == "failed"
    said += done.stdout + done.stderr
    server.refused = None

    done = run([PYTHON, *uploading, "--exit-interval", "3"], env=env)
    assert "resumed from" in done.stdout and f"step 3 is in {URL}/iter_0000003" in done.stdout
    assert stored() == [2, 3]
    said += done.stdout

    # The machine is lost, and the newest checkpoint is damaged: the one before is taken.
    shutil.copytree(output, tmp_path / "kept")
    shutil.rmtree(output)
    server.flip_a_bit("runs/one/iter_0000003/__0_0.distcp")
    done = run([PYTHON, *uploading], env=env)
    assert "iter_0000003/__0_0.distcp: its content differs from its checksum" in done.stdout
    assert f"resumed from {output / 'iter_0000002'} after step 2" in done.stdout
    assert stored() == [STEPS - 1, STEPS]
    said += done.stdout

    plain = tmp_path / "plain"
    run([PYTHON, *train(model, plain, *flags)], env=env)
    assert metrics_of(output) == metrics_of(plain) and len(metrics_of(output)) == STEPS
    assert_same_tensors(output / f"iter_{STEPS:07d}", plain / f"iter_{STEPS:07d}")

    # Damage here is made good from there.
    weights = output / f"iter_{STEPS:07d}" / "__0_0.distcp"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    done = run([PYTHON, *uploading], env=env)
    assert f"copying {URL}/iter_{STEPS:07d} to {output}" in done.stdout
    assert (output / f"damaged_iter_{STEPS:07d}").is_dir()
    assert_same_tensors(output / f"iter_{STEPS:07d}", plain / f"iter_{STEPS:07d}")

    # The folder of before would write into a store that another one has taken over.
    line = error_of(
        run([PYTHON, *train(model, tmp_path / "kept", *flags, "--upload-to", URL)], env=env, expect=2).stderr
    )
    assert "holds the checkpoints of another run (" in line and "choose another --upload-to" in line, line
    for name, source in (("url", URL), ("folder", plain)):
        run(command("convert", "export", checkpoint=source, output=tmp_path / name, no_verify=True), env=env)
    names = sorted(path.name for path in (tmp_path / "url").glob("*.safetensors"))
    assert names and all((tmp_path / "url" / n).read_bytes() == (tmp_path / "folder" / n).read_bytes() for n in names)

    # Two processes bring what a run has into an empty folder, train on, and send what each of them wrote.
    for key in server.names(f"runs/one/iter_{STEPS:07d}/"):
        server.client.delete_object(Bucket=BUCKET, Key=key)
    done = run(torchrun(2, *train(model, tmp_path / "two", *flags, "--upload-to", URL)), env=env)
    assert f"resumed from {tmp_path / 'two' / f'iter_{STEPS - 1:07d}'}" in done.stdout
    assert_same_tensors(tmp_path / "two" / f"iter_{STEPS - 1:07d}", plain / f"iter_{STEPS - 1:07d}")
    last = tmp_path / "two" / f"iter_{STEPS:07d}"
    files = {path.relative_to(tmp_path / "two").as_posix(): path for path in last.rglob("*") if path.is_file()}
    assert {f"{last.name}/__{rank}_0.distcp" for rank in (0, 1)} <= files.keys() and stored() == [STEPS - 1, STEPS]
    assert set(server.names(f"runs/one/{last.name}/")) == {f"runs/one/{name}" for name in files}
    assert all(server.read(f"runs/one/{name}") == path.read_bytes() for name, path in files.items())
    said += done.stdout + done.stderr

    assert SECRET not in said
    kept = [path for folder in (output, tmp_path / "two") for path in folder.rglob("*") if path.is_file()]
    assert len(kept) > 20 and not [path for path in kept if SECRET.encode() in path.read_bytes()]
    assert not [key for key in server.names() if SECRET.encode() in server.read(key)]


def test_a_store_that_cannot_be_used_ends_the_run_before_the_model_is_built(model: Path, tmp_path: Path) -> None:
    env = environment(AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY=SECRET)
    done = run([PYTHON, *train(model, tmp_path / "run", "--upload-to", URL)], env=env, expect=2)
    line = error_of(done.stderr)
    assert f"upload_to={URL}: the store cannot be reached, or fails" in line and SECRET not in done.stderr + done.stdout
    assert "model: llama" not in done.stdout and not (tmp_path / "run").exists()
