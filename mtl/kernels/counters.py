"""Counters in GPU memory that streams themselves write and wait for: so GPUs of one host tell each other what is done."""

import ctypes
import functools
from typing import Any

import torch


def write(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Let the stream set the counter at ``address``, in any GPU's memory that this one reaches."""
    _check(_driver().cuStreamWriteValue32_v2(ctypes.c_void_p(stream.cuda_stream), ctypes.c_uint64(address), ctypes.c_uint32(value), 0))


def wait(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Let the stream wait until the counter at ``address`` is at least ``value``; the process goes on."""
    _check(_driver().cuStreamWaitValue32_v2(ctypes.c_void_p(stream.cuda_stream), ctypes.c_uint64(address), ctypes.c_uint32(value), 0))


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"the CUDA driver refused a stream's write or wait, with code {code}")
