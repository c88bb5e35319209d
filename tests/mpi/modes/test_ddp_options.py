"""DDP's rarer options and torch's own hook wrappers: each works like plain DDP or is refused."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
import zoo
from ledger import Ledger, lossless, sparse
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from training import TINY_BUCKETS, assert_replicas_equal, flat, grad_of, loss_of, mlp, train, wrap

import sparsecomm as sc


def test_torchs_fp16_wrapper_around_the_hook(world: sc.World) -> None:
    """It hands over the bucket in half precision, whatever the parameters are."""
    ours = DistributedDataParallel(mlp(), bucket_cap_mb=TINY_BUCKETS)
    ours.register_comm_hook(lossless(), default_hooks.fp16_compress_wrapper(sc.sparse_hook))
    plain = wrap(mlp(), None)
    for _ in zip(train(ours, 5, momentum=0.0), train(plain, 5, momentum=0.0), strict=True):
        torch.testing.assert_close(flat(ours, grad_of), flat(plain, grad_of), rtol=0.01, atol=1e-3)
        assert_replicas_equal(ours)


def test_torchs_bf16_wrapper_is_refused_on_cpus_by_ddp(world: sc.World) -> None:
    ddp = DistributedDataParallel(mlp())
    with pytest.raises(TypeError, match="BF16"):
        ddp.register_comm_hook(lossless(), default_hooks.bf16_compress_wrapper(sc.sparse_hook))


def test_skipping_buckets_is_refused_with_what_works(world: sc.World) -> None:
    """skip_all_reduce_unused_params: DDP calls no hook for unused buckets, so that steps would not end."""
    options = {"find_unused_parameters": True, "skip_all_reduce_unused_params": True, "bucket_cap_mb": 1e-5}
    ddp = wrap(zoo.seeded(zoo.Branches), sparse(), **options)
    with pytest.raises(RuntimeError, match="find_unused_parameters=True alone works"):
        loss_of(ddp, 0).backward()


def test_parameters_whose_reduction_ddp_delays_do_not_meet_the_hook(world: sc.World) -> None:
    """delay_all_reduce_named_params: DDP averages those itself; ours gets the others."""
    if torch.get_default_dtype() != torch.float32:
        pytest.skip("DDP keeps delayed gradients in torch's default dtype, whatever the parameters have")
    model, plain = mlp(), wrap(mlp(), None)
    delayed = [(n, p) for n, p in model.named_parameters() if n.startswith("4.")]
    state = lossless()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = wrap(model, state, delay_all_reduce_named_params=delayed, param_to_hook_all_reduce=model[0].weight)
    for step in range(4):
        for ddp in (ours, plain):
            ddp.zero_grad()
            loss_of(ddp, step).backward()
        torch.testing.assert_close(flat(ours, grad_of), flat(plain, grad_of), rtol=1e-5, atol=1e-6)
    seen = {name for known in state._memories.known.values() for name in known.bucket.layout.names}
    assert seen == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_ddps_own_mixed_precision_is_refused_by_ddp(world: sc.World) -> None:
    """DDP registers another hook for it, and takes only one."""
    from torch.nn.parallel.distributed import _MixedPrecision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ddp = DistributedDataParallel(mlp(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="once"):
        ddp.register_comm_hook(sparse(), sc.sparse_hook)


def test_sync_batch_norm_is_refused_on_cpus_by_torch(world: sc.World) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(zoo.seeded(zoo.Normalized))
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        wrap(model, sparse())


def test_a_copy_of_a_ddp_model_is_refused_with_the_remedy_and_its_inner_model_may_be_copied(world: sc.World) -> None:
    """As for an average of weights (EMA, SWA)."""
    ddp = wrap(mlp(), sparse())
    for _ in train(ddp, 2):
        pass
    with pytest.raises(sc.StateError, match=r"state_dict|module"):
        copy.deepcopy(ddp)
    average = torch.optim.swa_utils.AveragedModel(ddp.module)
    for _ in train(ddp, 2, first=2):
        average.update_parameters(ddp.module)


def test_builtin_hooks_after_ours_are_refused_by_ddp(world: sc.World) -> None:
    ddp = wrap(mlp(), sparse())
    with pytest.raises(RuntimeError, match="once"):
        ddp.register_comm_hook(None, default_hooks.allreduce_hook)


def test_evaluation_between_steps_does_not_count(world: sc.World) -> None:
    state = sparse()
    ddp = wrap(mlp(), state)
    for step in train(ddp, 4):
        ddp.eval()
        with torch.no_grad():
            loss_of(ddp, 100 + step)
        with torch.inference_mode():
            loss_of(ddp, 200 + step)
        ddp.train()
    assert state.step == 4


@pytest.mark.parametrize("first_bucket", [None, 1], ids=["default", "one byte"])
def test_bucket_sizes_from_one_parameter_a_bucket_to_all_in_one(world: sc.World, first_bucket: int | None) -> None:
    for cap in (1e-6, 0.0005, 25.0):
        ledger = Ledger(mlp(), sparse(), bucket_cap_mb=cap)
        for step in range(4):
            ledger.step(partial(lambda s, at=ledger: loss_of(at.ddp, s).backward(), step))
            ledger.check()


@pytest.mark.filterwarnings("ignore::sparsecomm.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_zero_redundancy_optimizers(world: sc.World) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ledger = Ledger(mlp(), sparse())
    optimizer = ZeroRedundancyOptimizer(ledger.ddp.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-2)
    for step in range(4):
        ledger.step(partial(lambda s: loss_of(ledger.ddp, s).backward(), step))
        ledger.check()
        optimizer.step()
        ledger.check_replicas()
