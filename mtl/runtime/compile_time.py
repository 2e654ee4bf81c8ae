"""Where the time of compiling went, and what the compiler's caches gave: torch's own counts."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

_dynamo: Any = importlib.import_module("torch._dynamo.utils")


class CompileTime(NamedTuple):
    """Seconds of each phase so far in this process, and how many graphs came from a cache or not."""

    seconds: Mapping[str, float]
    hits: int
    misses: int
    uncached: int
    """Graphs that AOTAutograd's cache refuses: they are traced again at every start."""

    @property
    def total(self) -> float:
        """Sum the phases."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        """Say it in a line."""
        found = f"{self.hits} from the cache, {self.misses} new{f', {self.uncached} not cacheable' if self.uncached else ''}"
        return f"{self.total:.1f} s: " + ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items()) + f"; graphs {found}"


def compile_time() -> CompileTime:
    """Read torch's counts: tracing (once by Dynamo, twice by AOTAutograd), passes over graphs, inductor's phases, and loading."""

    def spent(*names: str) -> float:
        return sum(sum(_dynamo.compilation_time_metrics.get(name, ())) for name in names)

    whole, aot = spent("_compile.compile_inner"), spent("create_aot_dispatcher_function")
    inductor = spent("compile_fx.<locals>.fw_compiler_base", "compile_fx.<locals>.bw_compiler")
    lowering, generated, planned = spent("GraphLowering.run"), spent("GraphLowering.codegen"), spent("Scheduler.__init__")
    built = spent("GraphLowering.compile_to_module", "GraphLowering.compile_to_fn") / 2 - generated  # one inside the other
    phases = {
        "Dynamo": spent("bytecode_tracing"),
        "AOTAutograd": max(aot - inductor, 0.0),
        "graph passes": max(inductor - lowering - generated - max(built, 0.0), 0.0),
        "lowering": lowering,
        "scheduling": planned,
        "code": max(generated - planned, 0.0),
        "kernels": max(built, 0.0),
        "from cache": spent("AOTAutogradCache.inductor_load"),
    }
    phases["other"] = max(whole - sum(phases.values()), 0.0)
    counts: Any = _dynamo.counters
    fx, aot_counts = counts["inductor"], counts["aot_autograd"]
    phases["autotuning"] = spent("CachingAutotuner.benchmark_all_configs")  # when a kernel runs for the first time
    return CompileTime(phases, fx["fxgraph_cache_hit"], fx["fxgraph_cache_miss"], aot_counts["autograd_cache_bypass"])
