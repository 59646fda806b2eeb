"""The policy: megatron-core's GPTModel, built from layer specs, which returns the log-probs of places that have a loss.

The linear layers are Transformer Engine's or megatron-core's own (``implementation.py``), with our norms (``layers.py``). Both
use ``BlockAttention``, so layouts, context parallelism and numbers are the same, and checkpoint keys are always those of
megatron-core's Transformer Engine spec.

Shape legend: s = places on this context-parallel rank, N = places with a loss on this rank, H = hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from torch import Tensor

from megatron_longpo.config import Config, ParallelConfig, pipeline_split, virtual_pipeline_size
from megatron_longpo.model.attention import AttentionPlan, BlockAttention
from megatron_longpo.model.fp8 import (
    check_fp8,
    check_fp8_products,
    fp8_for_gradients_only,
    fp8_settings,
    keep_inputs_as_given,
)
from megatron_longpo.model.implementation import LayerChoice, choose_layers
from megatron_longpo.model.inputs import ModelInputs
from megatron_longpo.model.kernels import kernels_for
from megatron_longpo.model.layers import (
    GatedMLP,
    NormColumnParallelLinear,
    NormFirst,
    PolicyLayer,
    RMSNorm,
    offload_layers,
    set_recompute_up,
)
from megatron_longpo.model.logprobs import KnownGradients, chunk_tokens, default_chunk_bytes, token_logprobs
from megatron_longpo.model.rotary import Rotary
from megatron_longpo.model.shape import ModelShape
from megatron_longpo.runtime import platform
from megatron_longpo.runtime.balance import round_up
from megatron_longpo.runtime.process_groups import Parallel


def layer_spec(use_transformer_engine: bool, qk_layernorm: bool = False) -> ModuleSpec:
    """Spec of one layer, with Transformer Engine's linear layers and norms, or with megatron-core's and ours."""
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        column = type("TENormColumnParallelLinear", (NormFirst, TEColumnParallelLinear), {})
        row = TERowParallelLinear
    else:
        column, row = NormColumnParallelLinear, RowParallelLinear
    head_norm = _norm(use_transformer_engine) if qk_layernorm else IdentityOp
    return ModuleSpec(
        module=PolicyLayer,
        submodules=TransformerLayerSubmodules(
            # The linear layers that follow the norms include them.
            input_layernorm=IdentityOp,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=BlockAttention,
                    linear_proj=row,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=ModuleSpec(module=GatedMLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def transformer_config(shape: ModelShape, config: Config, *, use_transformer_engine: bool) -> TransformerConfig:
    """Make megatron-core's configuration of a model in a run."""
    parallel, training = config.parallel, config.training
    virtual = virtual_pipeline_size(parallel, shape.num_layers)
    batch_p2p = platform.use_batched_p2p(virtual is not None)
    platform.check_p2p(batch_p2p, virtual)
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    recompute: dict[str, Any] = {}
    if training.recompute_granularity in ("full", "selective"):
        recompute = {"recompute_granularity": training.recompute_granularity}
    if training.recompute_granularity == "full":
        recompute |= {
            "recompute_method": training.recompute_method,
            "recompute_num_layers": training.recompute_num_layers,
        }
    elif training.recompute_granularity == "selective":
        # The up-projection is recomputed by our own layers (layers.py), the other modules by megatron-core.
        modules = [m for m in training.recompute_modules if m != "mlp_up"]
        recompute = {**recompute, "recompute_modules": modules} if modules else {}
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=shape.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=shape.init_method_std,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        **_stage_sizes(parallel),
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Every micro batch has its own length, which pipeline stages communicate.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, even for dense models
        batch_p2p_comm=batch_p2p,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=training.bf16,
        # Of megatron-core's layers see layers.fuse_weight_gradients. Transformer Engine's would be told by marks on the weight
        # that autograd saved, which is another tensor where hooks decide what is saved.
        gradient_accumulation_fusion=False,
        # Weights come from a checkpoint, so random initialisation would be wasted.
        use_cpu_initialization=not use_transformer_engine,
        perform_initialization=False,
        deallocate_pipeline_outputs=True,
        **recompute,
        **(fp8_settings(training) if use_transformer_engine else {}),
    )


def _stage_sizes(parallel: ParallelConfig) -> dict[str, Any]:
    """How megatron-core divides the layers among pipeline ranks; ``pipeline_split`` gives the result."""
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first is not None and parallel.pipeline_model_parallel_size == 2:
        # The last rank has the rest. With both sizes, megatron-core (0.16.1) divides by the number of ranks between them.
        last = None
    return {
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
        "account_for_embedding_in_pipeline_split": parallel.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": parallel.account_for_loss_in_pipeline_split,
    }


class PolicyModel(GPTModel):
    """One model chunk of a pipeline stage. The last one returns log-probs instead of logits.

    Attributes:
        attention: the attention kernels, and why.
        implementation: the linear layers, and why.
        before_weight: called with a weight that is read outside of the module that it belongs to; megatron-core's DDP waits for
            gathered weights when a module's forward begins.
    """

    implementation: LayerChoice
    before_weight: Callable[[torch.nn.Parameter], None] | None = None

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        logprob_chunk_bytes: int | None,
        overlap_grad_reduce: bool,
        attention_backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(config, position_embedding_type="none", **kwargs)
        device = platform.CURRENT.device.type
        self.attention = kernels_for(device, config.params_dtype, shape.kv_channels, attention_backend)
        self.shape = shape
        self.overlap_grad_reduce = overlap_grad_reduce
        self.logprob_chunk_bytes = logprob_chunk_bytes or default_chunk_bytes()

    def forward(  # type: ignore[override]
        self, inputs: ModelInputs, rotary: Rotary, known: KnownGradients | None = None
    ) -> Tensor:
        """Run this stage.

        Args:
            inputs: the sequence.
            rotary: rotary embedding of the policy or of the reference.
            known: gradients that the log-probs will receive, where they are known.

        Returns:
            Log-probs [N] in fp32 on the last stage, hidden states [s (/TP with sequence parallelism), 1, H] on the others.
        """
        hidden = self.hidden_states(inputs.tokens_1s, inputs.positions_1s, inputs.attention, rotary)
        if not self.post_process:
            return hidden
        group = self.pg_collection.tp
        if not self.config.sequence_parallel:
            # Identity in the forward; all-reduce in the backward, since each rank holds its vocabulary's part of the gradient.
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        weight = self.shared_embedding_or_output_weight() if self._tied() else self.output_layer.weight
        if self.before_weight is not None:
            self.before_weight(weight)
        is_split = inputs.loss_counts is not None and len(inputs.loss_counts) > 1
        return token_logprobs(
            hidden[:, 0],
            weight,
            inputs.targets_N,
            vocab_size=self.shape.vocab_size,
            vocab_start=weight.shape[0] * dist.get_rank(group),
            group=group,
            chunk=chunk_tokens(weight.shape[0], self.logprob_chunk_bytes, weight.dtype, hidden.shape[2] * is_split),
            known=known,
            dummy_gradient=self.overlap_grad_reduce,
            rows_N=inputs.loss_places_N,
            counts=inputs.loss_counts,
        )

    def hidden_states(self, tokens_1s: Tensor, positions_1s: Tensor, plan: AttentionPlan, rotary: Rotary) -> Tensor:
        """Run the decoder of this stage.

        Returns:
            Hidden states, [s (/TP with sequence parallelism), 1, H]; normed on the last stage.
        """
        hidden = self.embedding(input_ids=tokens_1s, position_ids=positions_1s) if self.pre_process else None
        # The plan carries the rotary tables, so that all layers share one pair.
        cos_sin = rotary.cos_sin(positions_1s[0], self.config.params_dtype)
        with fp8_for_gradients_only(self.config):
            found: Tensor = self.decoder(
                hidden_states=hidden,
                attention_mask=None,
                packed_seq_params=plan.for_model(*cos_sin, self.attention.kernels),
            )
        return found

    def _tied(self) -> bool:
        return bool(self.share_embeddings_and_output_weights)


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Vocabulary size rounded up so that all tensor-parallel ranks have the same number of rows."""
    multiple = divisible_by * tensor_parallel_size
    return round_up(vocab_size, multiple)


def build_model(
    shape: ModelShape, config: Config, parallel: Parallel, *, reference_layers: bool = False
) -> list[PolicyModel]:
    """Build this pipeline rank's model chunks (one, or one per virtual stage), without loading weights.

    Args:
        shape: shape of the model.
        config: configuration of the run.
        parallel: process groups.
        reference_layers: use megatron-core's own layers, whatever the configuration says.

    Returns:
        The chunks, on the platform's device; or on the meta device if that is torch's default device during the call.
    """
    implementation = choose_layers("local" if reference_layers else config.model.transformer_impl)
    engine = implementation.is_transformer_engine
    if engine and config.training.fp8_format:
        check_fp8(shape, parallel.tensor_size)
        implementation = dataclasses.replace(implementation, reason=f"{implementation.reason}; products in FP8")
    megatron_config = transformer_config(shape, config, use_transformer_engine=engine)
    spec = layer_spec(engine, shape.qk_layernorm)
    chunks = []
    virtual = parallel.virtual_stages or 1
    split = pipeline_split(config.parallel, shape.num_layers)
    for stage in range(virtual):
        vp_stage = stage if parallel.virtual_stages else None
        first = parallel.pipeline_rank == 0 and stage == 0
        last = parallel.is_last_stage and stage == virtual - 1
        layers = split[parallel.pipeline_rank][stage]
        before = sum(sum(rank[:stage]) for rank in split) + sum(r[stage] for r in split[: parallel.pipeline_rank])
        block = TransformerBlockSubmodules(
            layer_specs=[spec] * layers,
            layer_norm=_norm(engine),
        )
        assert get_transformer_layer_offset(megatron_config, vp_stage=vp_stage) == before
        model = PolicyModel(
            config=megatron_config,
            shape=shape,
            logprob_chunk_bytes=config.model.logprob_chunk_bytes,
            overlap_grad_reduce=config.parallel.overlap_grad_reduce,
            attention_backend=config.model.attention_backend,
            transformer_layer_spec=block,
            vocab_size=padded_vocab_size(
                shape.vocab_size, config.model.make_vocab_size_divisible_by, parallel.tensor_size
            ),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
            vp_stage=vp_stage,
        )
        model.implementation = implementation
        _mark_tensor_parallel(model)
        training = config.training
        if engine and training.fp8_format:
            keep_inputs_as_given(model)
        of_full = layers if training.recompute_method == "uniform" else training.recompute_num_layers
        whole = of_full if training.recompute_granularity == "full" else 0
        set_recompute_up(
            model.decoder.layers,
            whole,
            training.recompute_granularity in ("selective", "full") and "mlp_up" in training.recompute_modules,
        )
        if training.cpu_offloading_num_layers and not reference_layers:
            offload_layers(model.decoder.layers, whole, training.cpu_offloading_num_layers)
        is_meta = any(p.is_meta for p in model.parameters())
        chunks.append(model if is_meta else model.to(platform.CURRENT.device))
    if megatron_config.fp8 and not is_meta:
        check_fp8_products(megatron_config)
    return chunks


def _mark_tensor_parallel(model: PolicyModel) -> None:
    """Mark sharded weights. megatron-core sets these attributes while initialising, a step that we skip.

    Without the mark the gradient norm would count only rank 0's shards, and clipping would be wrong without any error.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear)):
            if module.weight is None:
                continue
            dimension = 1 if isinstance(module, RowParallelLinear) else 0
            for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                if hasattr(module.weight, name):
                    delattr(module.weight, name)
            tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)


def _norm(use_transformer_engine: bool) -> Any:
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return RMSNorm
