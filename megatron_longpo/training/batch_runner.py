"""A global batch through the model: assigned to ranks and micro batches, forward, loss and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_longpo.data.sampler import assign_batch
from megatron_longpo.model.fp8 import alignment
from megatron_longpo.model.logprobs import check_known
from megatron_longpo.model.rotary import rotary_of
from megatron_longpo.runtime.balance import round_up
from megatron_longpo.runtime.process_groups import Parallel
from megatron_longpo.training.batch import PolicyBatch, batch_loss, policy_batch
from megatron_longpo.training.data_set import DataSet
from megatron_longpo.training.metrics import SampleMetrics
from megatron_longpo.training.plan import RunPlan


class BatchRunner:
    """Runs global batches through the policy.

    Args:
        plan: plan of the run.
        parallel: degrees and groups.
    """

    def __init__(self, plan: RunPlan, parallel: Parallel) -> None:
        self.plan, self.parallel = plan, parallel
        self.rotary = rotary_of(plan.policy_shape, plan.policy_shape.rotary_base)

    def forward_backward(
        self,
        model: Sequence[torch.nn.Module],
        batches: Sequence[PolicyBatch],
        *,
        count: int,
        forward_only: bool = False,
    ) -> list[SampleMetrics]:
        """Compute the mean loss over a global batch and its gradients, which are in DDP's buffers afterwards, reduced.

        Args:
            model: this pipeline rank's chunks, wrapped by DDP unless ``forward_only``.
            batches: micro batches of this data-parallel rank, as ``lay_out`` gives them.
            count: samples of the global batch.
            forward_only: take no gradients.

        Returns:
            Metrics of the samples of this data-parallel rank, on the last pipeline stage; nothing on the others.
        """
        found: list[SampleMetrics] = []

        def forward_step(iterator: Iterator[PolicyBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(iterator)

            def loss_func(logps_N: Tensor) -> tuple[Tensor, dict[str, Any]]:
                loss, values = batch_loss(logps_N, batch, objective=self.plan.config.objective, parallel=self.parallel)
                found.append(SampleMetrics(batch.places, values))
                return loss, {}

            return chunk(batch.micro_batch.inputs, self.rotary, None if forward_only else batch.known), loss_func

        several = len(model) > 1
        with torch.set_grad_enabled(not forward_only):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(batches) for _ in model] if several else iter(batches),
                model=list(model) if several else model[0],
                num_microbatches=len(batches),
                seq_length=1,  # ignored: lengths vary
                micro_batch_size=1,
                forward_only=forward_only,
            )
        if not forward_only:
            check_known([batch.known for batch in batches if batch.known is not None])
        # Places that fill the batch up hold no sample.
        return [metrics.before(count) for metrics in found]

    def lay_out(self, data: DataSet, numbers: Sequence[int], reference: np.ndarray | None) -> list[PolicyBatch]:
        """Read samples, and lay out the micro batches of this data-parallel rank.

        A batch that cannot be divided evenly is filled up with copies of its cheapest sample, whose loss does not count.

        Args:
            data: data set of the samples.
            numbers: numbers of the samples of the global batch, in order; any count of at least 1.
            reference: [global batch, 2] log-probs of the reference, or None.
        """
        config, parallel = self.plan.config, self.parallel
        micro_batch_size, count = config.training.micro_batch_size, len(numbers)
        # Interleaved schedules need a multiple of the pipeline size.
        stages = parallel.pipeline_size if parallel.virtual_stages else 1
        filled = round_up(count, micro_batch_size * parallel.data_size * stages)
        cheapest = min(range(count), key=lambda place: data.costs[numbers[place]])
        source = np.array([*range(count), *[cheapest] * (filled - count)])
        # The loss is a mean over all places: (1 / filled) * sum of (filled / count) * loss.
        factors = np.where(np.arange(filled) < count, filled / count, 0.0)
        places_of_batches = assign_batch(
            [data.costs[numbers[place]] for place in source],
            data_size=parallel.data_size,
            micro_batch_size=micro_batch_size,
        )[parallel.data_rank]
        return [
            policy_batch(
                data.samples([numbers[place] for place in source[places]]),
                places,
                None if reference is None else reference[source[places]],
                factors_B=factors[places],
                num_microbatches=len(places_of_batches),
                data=config.data,
                objective=config.objective,
                parallel=parallel,
                window=self.plan.shape.window_size,
                alignment=alignment(config.training),
            )
            for places in places_of_batches
        ]
