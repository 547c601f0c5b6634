"""What pyfast's optimizers share: the step, its extras, their states.

A class is a mixin of :class:`FusedOptimizer` and torch's class, which keeps the constructor, its
checks, the groups and the hooks. Whatever the kernels do not do goes to torch's own ``step``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _backend
from ..ops._optimizer_groups import Group, Missing, is_plain
from ..ops.optimizer_step import KERNELS, Hyper, Rule, Scaling, Workspace, prepare_step
from . import _extras
from ._distributed import local, total_norm
from ._ema import swapped
from ._parts import has_duplicates, parts_of


class FusedOptimizer(Optimizer):
    """One native call for all tensors of all groups.

    Subclasses say what their rule is made of: ``_rule``, ``_state_names`` and ``_hyper``.
    """

    _rule: ClassVar[Rule]
    _torch_class: ClassVar[type[Optimizer]]
    _grad_norm: Tensor | None = None
    _loading: dict[str, Any] | None = None
    _others: bool | None = None
    _is_made = False
    _kept: Workspace | None = None

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """The keys of the three states, None for one that the group does not need."""
        raise NotImplementedError

    def _hyper(self, group: dict[str, Any]) -> tuple[Hyper, int]:
        """The numbers and the flags of a group, without those of the extras."""
        raise NotImplementedError

    def _counts_steps(self, group: dict[str, Any]) -> bool:
        return True

    def _init_extras(self, extras: dict[str, Any]) -> None:
        """Called by constructors, after torch's: takes the extras into defaults and groups."""
        given = _extras.checked(type(self).__name__, extras)
        if given.get("stochastic_rounding") and "seed" not in given:
            given["seed"] = _extras.new_seed()
        self.defaults.update(given)
        for group in self.param_groups:
            for name, value in given.items():
                group.setdefault(name, value)
            self._check_group(group)
        self._is_made = True

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        _extras.check_values(name, group)
        limit = self.defaults.get("max_grad_norm")
        if group.get("max_grad_norm") != limit:
            raise ValueError(
                f"{name}: max_grad_norm must be that of the whole optimizer, {limit!r}, "
                f"in every group, got {group['max_grad_norm']!r}"
            )
        _extras.check_group(name, group)
        if group.get("stochastic_rounding") and group.get("seed") is None:
            group["seed"] = _extras.new_seed()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._others = None
        super().add_param_group(param_group)
        if not self._is_made:  # the constructor checks, when it knows the extras
            return
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of all gradients at the last step with ``max_grad_norm``, before clipping and
        after unscaling: a float32 scalar. None before the first."""
        return self._grad_norm

    # GradScaler asks for this name: the step takes grad_scale and found_inf. As with torch's
    # optimizers it is so with fused=True alone, for Lightning refuses to clip where it is; and with
    # zero_grads, for nothing else would zero the gradients of a step that is skipped.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        wanted = self.defaults.get("fused") or self.defaults.get("zero_grads")
        if not wanted or self._is_torchs():
            return False
        params = [p for group in self.param_groups for p in group["params"]]
        if any(p.grad is not None and p.grad.is_sparse for p in params):
            return False
        return not self._has_other_parameters() or not any(
            group.get("differentiable")
            or has_duplicates(group["params"])
            or not all(is_plain(local(p)) for p in group["params"])
            for group in self.param_groups
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._others, self._is_made = None, True
        if self._loading is not None:
            _extras.restore(self, self._loading)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, from any of its implementations and pyfast's, with two differences: states
        keep the dtype that this optimizer stores them in (torch casts them to the dtype of the
        parameter), converted where the saved one is another, int8 included; and ``state_dtype``
        and ``master_weights`` stay as this optimizer was made, whatever the saved one's were."""
        loading: dict[str, Any] = {
            "extras": [
                {key: group[key] for key in _extras.DEFAULTS if key in group}
                for group in self.param_groups
            ]
        }

        def capture(_: Optimizer, found: dict[str, Any]) -> None:
            for group in found["param_groups"]:
                _extras.check_values(type(self).__name__, group)
            loading["state_dict"] = found

        handle = self.register_load_state_dict_pre_hook(capture)
        self._loading = loading
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    @torch._disable_dynamo  # type: ignore[attr-defined]  # the public one is heavy to import
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step, of all parameters in one pass.

        Args:
            closure: reevaluates the model and returns the loss. Default: None

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: for sparse gradients, with torch's text. Nothing has changed after an
                error, but for parameters of another kind (complex, another device).
        """
        if "capturable" in self.defaults:
            _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and not self._counts_on_device():
            if found_inf.item():
                self._zero_gradients()
                return
            found_inf = None
        if self._is_torchs():
            self._torch_step(self.param_groups)
            return
        scaling = Scaling(getattr(self, "grad_scale", None), found_inf=found_inf)
        groups = [self._group(group, first) for group, first in self._with_first_index()]
        parts = self._parts(groups) if self._has_other_parameters() else None
        max_norm = self.param_groups[0].get("max_grad_norm")
        norm: Tensor | None = None
        if max_norm is not None:
            norm = self._total_norm(scaling.unscale)
            scaling.clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        created: list[tuple[Tensor, str]] = []
        try:
            self._step_all(groups, parts, scaling, created)
        except Exception:
            for p, name in created:
                del self.state[p][name]
                if not self.state[p]:
                    del self.state[p]
            raise
        if norm is not None:
            self._grad_norm = norm.float()

    def _step_all(
        self,
        groups: list[Group],
        parts: dict[Any, list[Any]] | None,
        scaling: Scaling,
        created: list[tuple[Tensor, str]],
    ) -> None:
        """Step the parts, or all groups together where there are none; notes the states that it
        creates. What the kernels take is checked before anything is stepped; torch's own code comes
        next, and checks as it goes."""
        if parts is None:
            like = next((p for group in groups for p in group.params), None)
            if like is None:
                return
            run = self._prepared(groups, like, scaling, created)
            if run is not None:
                run()
                return
            parts = self._parts(groups)
        torch_groups = parts.pop("torch", [])
        runs = []
        for part in parts.values():
            run = self._prepared(part, part[0].params[0], scaling, created)
            if run is None:
                raise RuntimeError(f"{type(self).__name__}: no kernel takes {part[0].params}")
            runs.append(run)
        if torch_groups:
            self._torch_step(torch_groups)
        for run in runs:
            run()

    def _has_other_parameters(self) -> bool:
        """Whether there are parameters, of those that have been given when groups were made, that
        the kernels do not take. Cheap: asked at every step."""
        if self._others is None:
            self._others = any(
                has_duplicates(group["params"])
                or not all(map(is_plain, group["params"]))
                or len({p.device for p in group["params"]} | {self._device()}) > 1
                for group in self.param_groups
            )
        return self._others or any(group.get("differentiable") for group in self.param_groups)

    def _is_torchs(self) -> bool:
        """Whether no kernel serves the device, and torch's own code does all that is asked for: it
        is then faster than the reference."""
        params = (p for group in self.param_groups for p in group["params"])
        like = next(filter(is_plain, map(local, params)), None)
        return (
            like is not None
            and _backend.forced() is None
            and not any(name in group for group in self.param_groups for name in _extras.DEFAULTS)
            and _backend.choose("optimizer_step", KERNELS, like) == "reference"
        )

    @property
    def _workspace(self) -> Workspace:
        if self._kept is None:
            self._kept = Workspace()
        return self._kept

    def _device(self) -> torch.device:
        params = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in params), torch.device("cpu"))

    def _zero_gradients(self) -> None:
        """What is left of a step that is skipped, with ``zero_grads``."""
        for group in self.param_groups:
            for p in group["params"]:
                if group.get("zero_grads") and p.grad is not None:
                    p.grad.zero_()

    def _with_first_index(self) -> Iterator[tuple[dict[str, Any], int]]:
        first = 0
        for group in self.param_groups:
            yield group, first
            first += len(group["params"])

    def _group(self, group: dict[str, Any], first_index: int) -> Group:
        hyper, flags = self._hyper(group)
        states = self._state_names(group)
        scales: tuple[str | None, ...] = (None, None, None)
        if group.get("state_dtype") == "int8":
            scales = tuple(None if name is None else f"{name}_scale" for name in states)
        counts = self._counts_steps(group) or self._is_random(group)
        master = group.get("master_weights", False)
        params = group["params"]
        return Group(
            params if isinstance(params, list) else list(params),
            self.state,
            (
                "step" if counts else None,
                *states,
                *scales,
                None if group.get("ema_decay") is None else "ema",
                "remainder" if master else None,
                "master" if master else None,
            ),
            hyper._replace(l1=group.get("l1", 0.0), ema_decay=group.get("ema_decay") or 0.0),
            flags | _extras.flags(group),
            first_index,
            seed=group.get("seed") or 0,
            options=group,
        )

    @staticmethod
    def _is_random(group: dict[str, Any]) -> bool:
        return group.get("state_dtype") == "int8" or bool(group.get("stochastic_rounding"))

    def _prepared(
        self,
        groups: list[Group],
        like: Tensor,
        scaling: Scaling,
        created: list[tuple[Tensor, str]],
    ) -> Callable[[], None] | None:
        """The step of plain tensors on one device, with their states; None if that is not what the
        groups are."""
        prepared = prepare_step(self._rule, groups, like, scaling, self._workspace)
        if not isinstance(prepared, Missing):
            return prepared
        if self._rule == Rule.SGD and scaling.skips():
            # A momentum buffer begins as a gradient that is applied; this one is not.
            return self._zero_gradients
        for group, positions in zip(groups, prepared.positions, strict=True):
            if positions:
                group.fresh = self._init_states(group, positions, created)
        prepared = prepare_step(self._rule, groups, like, scaling, self._workspace)
        assert not isinstance(prepared, Missing)
        return prepared

    def _init_states(
        self,
        group: Group,
        positions: list[int],
        created: list[tuple[Tensor, str]],
    ) -> list[bool]:
        """Create what is missing, and note it. Returns whose momentum buffer is new."""
        fresh = [False] * len(group.params)
        for position in positions:
            owner = (group.params if group.owners is None else group.owners)[position]
            state = self.state[owner]
            for kind, name in enumerate(group.names):
                if name is None or state.get(name) is not None:
                    continue
                tensor = _extras.new_state(owner, group.options, kind)
                if tensor is not None:
                    state[name] = tensor
                    created.append((owner, name))
                    fresh[position] |= kind == 1
                    if isinstance(group.states, list):
                        group.states[position][name] = local(tensor)
        return fresh

    def _total_norm(self, unscale: Tensor | None) -> Tensor:
        grads = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = total_norm(grads)
        return norm if unscale is None else norm / unscale.double().to(norm.device)

    def _counts_on_device(self) -> bool:
        """Whether step counts are on a GPU, where the kernel can leave them as they are."""
        on_device = self._device().type == "cuda" or _backend.emulates_cuda()
        return on_device and all(
            group.get("capturable") or group.get("fused") for group in self.param_groups
        )

    def _parts(self, groups: list[Group]) -> dict[Any, list[Any]]:
        return parts_of(groups, self.param_groups, self._rule, type(self).__name__)

    def _torch_step(self, groups: list[dict[str, Any]]) -> None:
        """torch's own step of some groups, without its hooks."""
        step = inspect.unwrap(self._torch_class.step)
        every, self.param_groups = self.param_groups, groups
        differentiable = any(group.get("differentiable") for group in groups)
        try:
            with torch.set_grad_enabled(differentiable):
                step(self)
        finally:
            self.param_groups = every

    @contextlib.contextmanager
    def ema_parameters(self) -> Iterator[None]:
        """In the block, parameters hold their averages (``ema_decay``), rounded to their dtype;
        then, whatever happens in it, their own values again. Those without an average stay."""
        pairs = [
            (p, self.state[p]["ema"])
            for group in self.param_groups
            for p in group["params"]
            if "ema" in self.state.get(p, {})
        ]
        with swapped(pairs):
            yield


# Its name in torch 2.11 or after.
_check_capture: Callable[[Optimizer], None] = getattr(
    Optimizer, "_accelerator_graph_capture_health_check", None
) or getattr(Optimizer, "_cuda_graph_capture_health_check")  # noqa: B009
