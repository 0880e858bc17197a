"""Several processes that train one model, each on its part of every batch, as started by torchrun.

The gradient is reduced after the backward pass, in one sum over all weights. DistributedDataParallel would overlap the
sum with the backward pass. But its collectives start within that pass: a process that runs out of memory there leaves
the others waiting, and no smaller micro-batch can be tried. Here the processes first exchange four numbers through
host memory, by gloo. They learn whether one of them failed, is to stop, or ran out of memory, and all act alike. A GPU
is not waited for. The sum itself is by nccl on GPUs and by gloo on CPUs.

A process that fails takes part in one more exchange and says why. So an error in any process ends all of them.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wbdit.errors import InputError, SharedError
from wbdit.generator import find_device

TIMEOUT = timedelta(minutes=10)  # longest wait for the slowest process: compiling kernels, saving, reading cells
LAST_WORDS, SHORT_WORDS = timedelta(seconds=60), timedelta(seconds=5)  # a failed or interrupted one waits so long
MESSAGE_BYTES = 2000
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of torchrun

logger = logging.getLogger("wbdit")
P = ParamSpec("P")
T = TypeVar("T")


class Exchange(NamedTuple):
    """What the processes tell one another: each entry is a sum over all of them."""

    failed: float = 0.0
    stop: float = 0.0
    out_of_memory: float = 0.0
    number: float = 0.0


class LostProcess(SharedError):
    """Another process has ended or does not answer."""


class Ranks:
    """The processes that train together.

    Parameters
    ----------
    rank, size
        Number of this process, and number of all processes.
    control, host
        Groups for exchanges and for tensors in host memory; None for one process alone. There are two, so that the
        last words of a failed process meet no sum of tensors. Tensors on a GPU take the default group.

    Examples
    --------
    >>> from wbdit.training.distributed import Ranks
    >>> Ranks().part(64), Ranks(rank=1, size=3).part(64)
    (slice(0, 64, None), slice(21, 42, None))
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        control: dist.ProcessGroup | None = None,
        host: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self._control = control
        self._host = host

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that logs and saves."""
        return self.rank == 0

    def part(self, n: int, block: int = 1) -> slice:
        """Return the rows of `n` that are this process's; a part ends at a multiple of `block` or at the end."""
        blocks = -(-n // block)
        first, beyond = (blocks * rank // self.size * block for rank in (self.rank, self.rank + 1))
        return slice(min(first, n), min(beyond, n))

    def device(self, name: str) -> torch.device:
        """Return the device of a name, as :func:`wbdit.generator.find_device`; each process has a GPU of its own.

        Raises
        ------
        InputError
            If the device is unknown, or there are fewer GPUs than processes on this machine.
        """
        device = find_device(name)
        if self.size > 1 and device.type == "cuda":
            if device.index is not None:
                raise InputError(f'`device="{name}"` is one GPU, but there are {self.size} processes: give "cuda"')
            device = find_device(f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}")
            torch.cuda.set_device(device)
        return device

    def exchange(self, stop: bool = False, out_of_memory: bool = False, number: float = 0.0) -> Exchange:
        """Return the sums of what the processes tell; all of them must call it.

        Raises
        ------
        LostProcess
            If a process has ended, or does not answer within :data:`TIMEOUT`.
        SharedError
            If a process has failed; the message is its own.
        """
        told = Exchange(0.0, float(stop), float(out_of_memory), number)
        if self.size == 1:
            return told
        sums = torch.tensor(told, dtype=torch.float64)
        with self._listening():
            dist.all_reduce(sums, group=self._control)
        met = Exchange(*sums.tolist())
        if met.failed:
            rank, message = self._share_message("")
            raise SharedError(f"process {rank}: {message}", self.is_first)
        return met

    def from_first(self, compute: Callable[[], float]) -> float:
        """Return a number that the first process computes, in all processes."""
        return self.exchange(number=compute() if self.is_first else 0.0).number

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating tensors on the device by their sums over the processes, in one collective."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._listening():
            dist.all_reduce(flat, group=self._group(flat))
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def gather(self, part: Tensor, n: int, block: int = 1) -> Tensor:
        """Return all `n` rows, of which `part` holds this process's; see :meth:`part`. The tensors are on the CPU."""
        if self.size == 1:
            return part
        self.exchange()
        whole = part.new_zeros(n, *part.shape[1:])
        whole[self.part(n, block)] = part
        with self._listening():
            dist.all_reduce(whole, group=self._host)
        return whole

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first process, as machines may round differently."""
        if self.size == 1:
            return
        self.exchange()
        for tensor in tensors:
            with self._listening():
                dist.broadcast(tensor.detach(), group_src=0, group=self._group(tensor))

    def check_same(self, name: str, *contents: bytes) -> None:
        """Raise an InputError if the processes do not hold the same contents."""
        if self.size == 1:
            return
        digest = hashlib.sha256(b"".join(contents)).digest()
        own = torch.frombuffer(bytearray(digest), dtype=torch.uint8)[None].int()
        every = self.gather(own, self.size)
        others = (every != every[0]).any(1).nonzero().flatten().tolist()
        if others:
            raise InputError(f"process {others[0]} has other {name} than process 0: give all processes the same file")

    def fail(self, error: BaseException) -> BaseException:
        """Tell the other processes why this one ends; return the error to raise here."""
        message = str(error) if isinstance(error, InputError) else f"{type(error).__name__} {error}".strip()
        sums = torch.tensor(Exchange(failed=1.0), dtype=torch.float64)
        try:
            work = dist.all_reduce(sums, group=self._control, async_op=True)
            assert work is not None
            work.wait(LAST_WORDS if isinstance(error, Exception) else SHORT_WORDS)
            self._share_message(message)
        except RuntimeError:  # the others have gone
            return error
        return SharedError(message, self.is_first) if isinstance(error, InputError) else error

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._host if tensor.device.type == "cpu" else None

    def _share_message(self, message: str) -> tuple[int, str]:
        """Return the first message of all processes, and the number of its process."""
        every = torch.zeros(self.size, MESSAGE_BYTES, dtype=torch.uint8)
        content = bytearray(message.encode()[:MESSAGE_BYTES])
        if content:
            every[self.rank, : len(content)] = torch.frombuffer(content, dtype=torch.uint8)
        with self._listening():
            dist.all_reduce(every, group=self._control)
        texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in every]
        return next(((rank, text) for rank, text in enumerate(texts) if text), (0, "it failed"))

    @contextmanager
    def _listening(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).splitlines()[0]
            lost = f"another process of this training has ended or does not answer ({reason})"
            raise LostProcess(lost, self.is_first) from error


_joined: Ranks | None = None


def current() -> Ranks:
    """Return the processes of the enclosing :func:`joined` block; this process alone outside of one."""
    return _joined or Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that train together: those of the default process group, or else those that torchrun started.

    Only the first process logs. An error in one process ends the block in all of them. Blocks may be nested.

    Raises
    ------
    InputError
        If another process fails or has ended, or the processes cannot reach one another.

    Examples
    --------
    >>> from wbdit.training.distributed import joined
    >>> with joined() as ranks:
    ...     ranks.size
    1
    """
    global _joined
    if _joined is not None:
        yield _joined
        return
    if all(name in os.environ for name in VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1:
        _start()
    _joined = ranks = _ranks()
    try:
        with _silenced(not ranks.is_first):
            yield ranks
            ranks.exchange()  # a process ends well only if all do
    except LostProcess:
        atexit.unregister(dist.destroy_process_group)  # it might wait for the process that is lost
        raise
    except SharedError:
        raise
    except BaseException as error:
        if ranks.size == 1:
            raise
        raise ranks.fail(error) from error
    finally:
        _joined = None


def joins_others(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function in a :func:`joined` block.

    Examples
    --------
    >>> from wbdit.training.distributed import current, joins_others
    >>> joins_others(lambda: current().size)()
    1
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with joined():
            return function(*args, **kwargs)

    return call


def _start() -> None:
    """Start the default process group from the environment that torchrun sets, once and until the program ends."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the processes cannot reach one another ({reason}): check torchrun's arguments") from error
    atexit.register(dist.destroy_process_group)


def _ranks() -> Ranks:
    """Return the processes of the default process group, with a group of their own for exchanges."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    control, host = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
    return Ranks(dist.get_rank(), dist.get_world_size(), control, host)


@contextmanager
def _silenced(silent: bool) -> Iterator[None]:
    """Drop the package's log messages."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    if not silent:
        yield
        return
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
