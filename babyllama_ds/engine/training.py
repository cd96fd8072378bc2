"""One model under ZeRO-2: a module and numbers enter; steps, norms and its whole state leave.

DeepSpeed is imported when an engine is made, not before: its import settles which accelerator
it uses, and `engine.distributed.start` decides that from the job.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from babyllama_ds.engine.averaging import WeightAverage
from babyllama_ds.engine.lean import make_lean
from babyllama_ds.engine.muon import MOMENTUM, AdamWWithMuon
from babyllama_ds.spec.training import TrainingSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "ema"
"""The moving average's name among an optimizer's states."""
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
    """DeepSpeed's engine with AdamW or Muon, the job's numbers, and a state that any rank count can
    read.

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
        self.module, self._device = module, device
        optimizer = (
            adamw(module, training) if training.muon is None else AdamWWithMuon(module, training)
        )
        _name_as_tested(type(optimizer))
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=dict(config), dist_init_required=False
        )
        make_lean(self._engine.optimizer)
        self._average = self._make_average(training)
        self._make_states()
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
            group["lr"] = rate * group.get("of_rate", 1.0)
        updates = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if self._average is not None and updates and not self.overflowed:
            self._average.update()

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

    # -- the moving average ----------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the module holds the moving average, where there is one. A collective."""
        self.show_average()
        yield
        # Not in a `finally`: it is a collective, and after an error training ends on every rank.
        if self._average is not None:
            self._engine.optimizer.update_lp_params()

    def show_average(self) -> None:
        """Have the module hold the moving average, where there is one. A collective."""
        if self._average is None:
            return
        zero = self._engine.optimizer
        masters = zero.single_partition_of_fp32_groups
        zero.single_partition_of_fp32_groups = self._average.values
        zero.update_lp_params()
        zero.single_partition_of_fp32_groups = masters

    def _make_average(self, training: TrainingSpec) -> WeightAverage | None:
        if training.ema is None:
            return None
        return WeightAverage(training.ema, self._engine.optimizer.single_partition_of_fp32_groups)

    # -- the state, by parameter name ------------------------------------------------------------

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Master weights and moments, whole, in fp32 on the CPU, one after another.

        Keys are `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`; of Muon's matrices
        `momentum_buffer/NAME` instead of both; with a moving average `ema/NAME`. A collective:
        every rank iterates to the end.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self._trained():
            yield f"master/{name}", safe_get_full_fp32_param(parameter).cpu()
            for key in self._states_of[parameter]:
                yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key).cpu()

    def load_named_state(self, read: Callable[[str, torch.Size], Tensor], *, step: int) -> None:
        """Continue from `named_state` after `step` updates, whatever the number of ranks then.

        `read(key, shape)` gives one whole tensor of `named_state`, called in its order.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for state in self._engine.optimizer.optimizer.state.values():
            if "step" in state:  # Muon counts none
                state["step"].fill_(step)
        for name, parameter in self._trained():
            shape, device = parameter.shape, parameter.device
            safe_set_full_fp32_param(parameter, read(f"master/{name}", shape).to(device))
            for key in self._states_of[parameter]:
                moment = read(f"{key}/{name}", shape).to(device)
                safe_set_full_optimizer_state(parameter, moment, key)
        # The bf16 weights are the masters, rounded, as after every update.
        self._engine.optimizer.update_lp_params()
        if self._average is not None:
            self._average.updates = step

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that the optimizer has; a loaded model may keep others as they are."""
        for name, parameter in self.module.named_parameters():
            if parameter in self._states_of:
                yield name, parameter

    def _make_states(self) -> None:
        """Make the optimizer's state now, all of it, and the moving average as one state more.

        AdamW would make its own at its first update. DeepSpeed then connects parameters with their
        slices of it after the first group's update, and never again: the second group's moments
        (norms, biases) would stay unknown to `safe_get_full_optimizer_state`.
        """
        zero = self._engine.optimizer
        self._states_of: dict[nn.Parameter, tuple[str, ...]] = {}
        for number, group in enumerate(zero.optimizer.param_groups):
            (partition,) = group["params"]
            by_muon = group.get("muon", False)
            keys: tuple[str, ...] = (MOMENTUM,) if by_muon else MOMENTS
            states = {key: torch.zeros_like(partition) for key in keys}
            if self._average is not None:
                states[AVERAGE] = self._average.values[number]
            keys = tuple(states)
            self._states_of |= dict.fromkeys(zero.bit16_groups[number], keys)
            if not by_muon:
                states["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
            zero.optimizer.state[partition] = states
        zero._lazy_init_hp_params_optimizer_state()
        if isinstance(zero.optimizer, AdamWWithMuon):
            zero.optimizer.cut(zero)

    def destroy(self) -> None:
        """Free the engine, its buffers and hooks; the module stays."""
        engine = self._engine
        engine.destroy()
        # DeepSpeed leaves these, which hold the engine for as long as there is the module.
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        for parameter in self.module.parameters():
            _without_own_methods(parameter)
        del engine, self._engine, self._average, self._states_of
        # It lies in reference cycles. Until Python looks for these by itself, the next stage would
        # find a card that still holds this one's masters and moments.
        gc.collect()
        # What torch keeps of them goes back to the card. Else the next stage's first tensors would
        # lie in parts of it, and the rest count as taken for whoever asks what is free.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


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


def _without_own_methods(parameter: nn.Parameter) -> None:
    """Let go of what DeepSpeed binds to each parameter, by which it holds itself."""
    for name, value in list(vars(parameter).items()):
        if getattr(value, "__self__", None) is parameter:
            delattr(parameter, name)


def _name_as_tested(optimizer: type[torch.optim.Optimizer]) -> None:
    """Have DeepSpeed take the optimizer under ZeRO without telling users to proceed with caution.

    It does so for those of its list. AdamW stands there; our Muon is held to `torch.optim.Muon`
    under ZeRO-2, on one rank and two, by tests here.
    """
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if optimizer not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)
