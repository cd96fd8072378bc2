"""One model under ZeRO-2: a module and numbers enter; steps, norms and its whole state leave.

DeepSpeed is imported when an engine is made, not before: its import settles which accelerator
it uses, and `engine.distributed.start` decides that from the job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from babyllama_ds.spec.training import TrainingSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
"""What ZeRO's communication goes through, by DeepSpeed's names."""


class TrainingEngine:
    """DeepSpeed's engine with AdamW, the job's numbers, and a state that any rank count can read.

    `config` is the one dictionary that DeepSpeed gets (`spec.deepspeed.deepspeed_config`).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        training: TrainingSpec,
        config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        import deepspeed

        # A model loaded by transformers comes in eval mode, which would leave its dropout off.
        module.train().to(device)
        self.module = module
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(module, training),
            config=dict(config),
            dist_init_required=False,
        )
        self._make_moments()
        self.accumulation_steps: int = self._engine.gradient_accumulation_steps()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's forward pass, through the engine's hooks."""
        return self._engine(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss` / accumulation steps, averaged over ranks."""
        self._engine.backward(loss)

    def step(self, rate: float) -> None:
        """End of a micro-batch: at the last one of a batch, clip and update at `rate`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()

    @contextmanager
    def communicating(self, part: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Within, each of DeepSpeed's collectives runs inside a `part()`, to be timed."""
        from deepspeed.comm import comm

        def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                with part():
                    return collective(*arguments, **named)

            return run

        for name in COLLECTIVES:
            setattr(comm.cdb, name, timed(getattr(comm.cdb, name)))
        try:
            yield
        finally:
            for name in COLLECTIVES:
                delattr(comm.cdb, name)  # the class's own method shows again

    @property
    def overflowed(self) -> bool:
        """Whether the last update was left out because a gradient was not finite."""
        return bool(self._engine.optimizer.overflow)

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last update, before clipping. Synchronises the device."""
        return float(self._engine.get_global_grad_norm())

    # -- the state, by parameter name ------------------------------------------------------------

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Master weights and moments, whole, in fp32 on the CPU, one after another.

        Keys are `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`. A collective: every rank
        iterates to the end.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.module.named_parameters():
            yield f"master/{name}", safe_get_full_fp32_param(parameter).cpu()
            for key in MOMENTS:
                yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key).cpu()

    def load_named_state(self, read: Callable[[str, torch.Size], Tensor], *, step: int) -> None:
        """Continue from `named_state` after `step` updates, whatever the number of ranks then.

        `read(key, shape)` gives one whole tensor of `named_state`, called in its order.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for state in self._engine.optimizer.optimizer.state.values():
            state["step"].fill_(step)
        for name, parameter in self.module.named_parameters():
            shape, device = parameter.shape, parameter.device
            safe_set_full_fp32_param(parameter, read(f"master/{name}", shape).to(device))
            for key in MOMENTS:
                moment = read(f"{key}/{name}", shape).to(device)
                safe_set_full_optimizer_state(parameter, moment, key)
        # The bf16 weights are the masters, rounded, as after every update.
        self._engine.optimizer.update_lp_params()

    def _make_moments(self) -> None:
        """Make AdamW's state now, all of it.

        AdamW would make it at its first update. DeepSpeed then connects parameters with their
        slices of it after the first group's update, and never again: the second group's moments
        (norms, biases) would stay unknown to `safe_get_full_optimizer_state`.
        """
        zero = self._engine.optimizer
        adam: torch.optim.AdamW = zero.optimizer
        for partition in zero.single_partition_of_fp32_groups:
            adam.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=partition.device),
                **{key: torch.zeros_like(partition) for key in MOMENTS},
            }
        zero._lazy_init_hp_params_optimizer_state()

    def destroy(self) -> None:
        """Free the engine, its buffers and hooks; the module stays."""
        self._engine.destroy()
        del self._engine


def adamw(module: nn.Module, training: TrainingSpec) -> torch.optim.AdamW:
    """AdamW with two groups: matrices and embeddings decay, norms and biases do not.

    The groups of transformers' Trainer, which the published recipes use: in LLaMA and GPT-2
    norms and biases are exactly the parameters of one dimension.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.dim() > 1],
            "weight_decay": training.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.dim() <= 1],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.epsilon,
        fused=True,
    )
