"""Averaging between the replicas of a model under FSDP2 (HSDP): dense inside a replica, by a state between them.

torch calls the all-reduce hook of a parameter group once in a backward pass, with the flat and padded sum that its
reduce-scatter leaves here, and adds that sum to the parameters' `.grad` as soon as the hook returns. So that the pass
need not wait, the hook takes the sum away and leaves zeros. The averages are added to `.grad` at the end of the pass.
torch does not tell the hook which parameters the sum is of. It calls their own hooks right afterwards, in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.autograd import Variable

from sparsecomm.ddp.sharded import check_layout, check_replicas, check_state, parameter_groups
from sparsecomm.ddp.state import SparseState
from sparsecomm.errors import ConfigError
from sparsecomm.runtime.device import side_of
from sparsecomm.runtime.shards import local_part, place_of

__all__ = ["average_replicas"]


def average_replicas(model: torch.nn.Module, state: SparseState) -> None:
    """Averages the gradients of a model under `fully_shard` over its replicas in every backward pass from now on.

    torch sums gradients over the ranks of one replica, and the state averages each shard over the ranks that hold it.
    Call it once, after `fully_shard` and before the first pass. Collective over the state's process group. An exchange
    runs while the pass goes on, and `loss.backward()` returns when all averages are in `.grad`.

    ```
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    fully_shard(model, mesh=mesh["shard"])
    state = sc.SparseState(sc.TopK(0.01), model=model, process_group=mesh["replica"].get_group())
    sc.average_replicas(model, state)
    ```

    Args:
        model: a model under `fully_shard` on a mesh of one dimension, with all its parameters.
        state: a state made with ``SparseState(..., model=model, process_group=...)``, whose group is that of the ranks
            that hold the same shard.

    Raises:
        ConfigError: for a model that is not sharded, is not sharded as a whole, is averaged over its replicas already,
            or a state of another model or of ranks that hold different shards. A backward pass raises it for an option
            that is not supported.
    """
    groups = parameter_groups(model)
    check_layout(model)
    check_state(model, state)
    check_replicas(state)
    exchange = _Exchange(state)
    for module, group in groups:
        module.set_all_reduce_hook(partial(exchange.reduced, group))


@dataclass(slots=True, eq=False)
class _Reduced:
    """The gradients of one parameter group in one backward pass, summed over the replica.

    Attributes:
        group: torch's parameter group.
        padded: the sum as torch laid it out, in its dtype.
        mark: marks the work on a GPU that makes the sum.
        exchanged: whether the sum is exchanged in this pass, and not kept for a later one.
        parameters: parameters with a gradient, in order.
        grad: the sum without padding; holds the average when `future` is complete.
        future: completes with the exchange.
    """

    group: Any
    padded: torch.Tensor
    mark: Any
    exchanged: bool
    parameters: list[torch.Tensor] = field(default_factory=list)
    grad: torch.Tensor = field(init=False)
    future: torch.futures.Future[torch.Tensor] = field(init=False)


class _Exchange:
    """The backward passes of one model.

    The last bucket of a pass is known only at its end: a pass may leave layers out. So a bucket starts when the next
    one comes, and the last one at the end.

    Args:
        state: the state that averages.
    """

    def __init__(self, state: SparseState) -> None:
        self._state = state
        self._pass = -1  # id of the backward pass that torch works on; -1 outside of one
        self._current: _Reduced | None = None  # its parameters are not all known yet
        self._waiting: _Reduced | None = None  # may be the last
        self._flying: list[_Reduced] = []
        self._kept: dict[int, _Reduced] = {}  # sums of earlier passes without an exchange, by id of the group
        self._numbers: dict[int, int] = {}  # usual bucket number, by id of the group
        self._number = -1  # of the bucket that was started last
        self._watched: set[int] = set()  # ids of the parameters with our hook

    def reduced(self, group: Any, output: torch.Tensor) -> None:
        """Takes a group's sum. torch's all-reduce hook.

        Args:
            group: torch's parameter group.
            output: the flat sum. Mutated: zero afterwards.
        """
        now: int = torch._C._current_graph_task_id()
        if now != self._pass:
            self._begin(now)
        self._complete()
        exchanged: bool = group.all_reduce_grads
        if exchanged:
            self._start(last=False)
        for one in group.fsdp_params:
            p = one.sharded_param
            if p.requires_grad and id(p) not in self._watched:
                p.register_post_accumulate_grad_hook(self.accumulated)
                self._watched.add(id(p))
        self._current = _Reduced(group, output.clone(), side_of(output.device).mark(), exchanged)
        output.zero_()

    def accumulated(self, parameter: torch.Tensor) -> None:
        """Notes a parameter whose part of the sum torch has added to `.grad`. torch's hook of the parameter."""
        assert self._current is not None, "torch reduces the gradient first"
        self._current.parameters.append(parameter)

    def _begin(self, now: int) -> None:
        """Begins a backward pass. One that raised an error has left its buckets behind; they are lost with it."""
        if self._pass != -1:
            self._kept.clear()
        self._current = self._waiting = None
        self._flying = []
        self._pass, self._number = now, -1
        # Before it come torch's own callbacks, which reduce the groups whose inputs need no gradient.
        Variable._execution_engine.queue_callback(self._end)

    def _complete(self) -> None:
        """Takes note that all parameters of the current sum are known."""
        new, self._current = self._current, None
        if new is None:
            return
        kept = self._kept.pop(id(new.group), None)
        if kept is not None:
            _add_kept(new, kept)
        if new.exchanged:
            self._waiting = new
        else:
            self._kept[id(new.group)] = new

    def _start(self, *, last: bool) -> None:
        """Hands the waiting bucket over."""
        new, self._waiting = self._waiting, None
        if new is None:
            return
        if new.mark is not None:  # the end of a pass has another stream than torch's hooks
            torch.cuda.current_stream(new.padded.device).wait_event(new.mark)
        # A group keeps its number in a pass that leaves others out, unless torch comes to the groups in another order.
        usual = self._numbers.setdefault(id(new.group), len(self._numbers))
        self._number = max(self._number + 1, usual)
        error: Exception | None = None
        try:
            _check_pass(new)
            new.grad = _without_padding(new)
        except Exception as failure:  # the other replicas must learn of it
            n = sum(local_part(p).numel() for p in new.parameters)
            error, new.grad = failure, torch.zeros(n, dtype=new.padded.dtype, device=new.padded.device)
        new.future = self._state.start(self._number, new.parameters, new.grad, last=last, error=error)
        self._flying.append(new)

    def _end(self) -> None:
        """Ends a backward pass: waits for all exchanges and adds the averages to `.grad`.

        Raises:
            SparseCommError: on every rank that holds the shard, if an exchange failed on any. `.grad` is then as before
                the pass, or zero.
        """
        self._complete()
        self._start(last=True)
        ended, self._flying, self._pass = self._flying, [], -1
        failed: BaseException | None = None
        for one in ended:  # all of them, since no exchange may be in flight when the pass ends
            try:
                one.future.wait()
            except RuntimeError as error:
                failed = failed or self._state.last_error or error
        if failed is not None:
            raise failed
        with torch.no_grad():
            for one in ended:
                _give_back(one.parameters, one.grad)


def _check_pass(new: _Reduced) -> None:
    """Checks what torch does with a sum once the hook has returned.

    Raises:
        ConfigError: if it would change the average, or somebody has used `.grad` before the average was there.
    """
    if new.padded.dtype == torch.float16:
        raise ConfigError(
            "MixedPrecisionPolicy(reduce_dtype=torch.float16) is not supported, since torch divides such sums after "
            "the exchange; use torch.bfloat16 or torch.float32"
        )
    if getattr(new.group, "force_sum_reduction_for_comms", False):
        raise ConfigError("set_force_sum_reduction_for_comms(True) is not supported: torch divides after the exchange")
    for p in new.parameters:
        if len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) > 1:
            raise ConfigError(
                f"a parameter of shape {tuple(p.shape)} has a post-accumulate-grad hook, which torch calls before the "
                "average is in .grad; step the optimizer after loss.backward()"
            )


def _add_kept(new: _Reduced, kept: _Reduced) -> None:
    """Adds the sum of earlier passes, which `set_requires_all_reduce(False)` kept on this rank."""
    if list(map(id, new.parameters)) != list(map(id, kept.parameters)):
        raise ConfigError(
            f"{len(kept.parameters)} parameters had gradients in passes with set_requires_all_reduce(False), and "
            f"{len(new.parameters)} others in the pass after them; accumulate with set_requires_gradient_sync(False)"
        )
    new.padded += kept.padded


def _padded_numel(p: torch.Tensor) -> int:
    """Returns the elements of a parameter's shard as torch reduces it: rows are padded to the longest shard's."""
    rows, shards = p.shape[0], place_of(p).shards
    return -(-rows // shards) * p.shape[1:].numel()


def _without_padding(new: _Reduced) -> torch.Tensor:
    """Returns the sums of the shards' elements, one parameter after the other."""
    sizes = [_padded_numel(p) for p in new.parameters]
    assert sum(sizes) == new.padded.numel(), "torch lays the sums of these parameters out one after the other"
    own = [local_part(p).numel() for p in new.parameters]
    if own == sizes:
        return new.padded
    return torch.cat([part[:n] for part, n in zip(torch.split(new.padded, sizes), own, strict=True)])


def _give_back(parameters: Sequence[torch.Tensor], average: torch.Tensor) -> None:
    """Adds an average to the gradients, which lack it so far."""
    sizes = [local_part(p).numel() for p in parameters]
    for p, part in zip(parameters, torch.split(average, sizes), strict=True):
        assert p.grad is not None, "torch has added zeros to it"
        grad = local_part(p.grad)
        grad.add_(part.view(grad.shape).to(grad.device))
