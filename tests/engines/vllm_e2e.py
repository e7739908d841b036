"""The whole way with a real vLLM: KV is computed, saved, restored elsewhere, and compared.

    vllm_e2e.py --model DIR --kvtierd PATH --work DIR [--json OUT] [--quick]

Every phase is an engine in a process of its own, on the CPU (forked from one that has vLLM
imported, which takes longer than most phases):
  cold      no connector, no prefix cache: what recomputing costs
  apc       vLLM's own prefix cache, every prompt twice: the second is the reference to the bit,
            since it computes the same tail as a restored prompt does; a cold run computes it in
            another shape, and rounds otherwise
  store     the connector saves; outputs are those of cold
  restore   the daemon was restarted, so blocks come from the device; then again, from host
            memory; in a new engine each: outputs are those of apc, bit by bit
  chunked   prompts computed and saved in steps of 1024 tokens
  preempted more requests at once than the engine has memory for
  shared    prompts with a common prefix, all at once, with vLLM's prefix cache on
  killed    the daemon dies in the midst of a load: the prompt is computed; the daemon comes back,
            and the next one is loaded
  absent    no daemon at the start; one that comes later is used
  others    another dtype and another block size find nothing
  peer      the same prompts through a connector of vLLM that keeps files

Exit status 0 when every check holds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from daemon import Daemon
from results import Rows, Run, distance, identical, of_length
from texts import Texts, prompts
from vllm_phase import run_forked

PHASES = "cold,apc,store,restore,chunked,preempted,shared,others,killed,absent,peer"
TOKENS = 32
NOISE = 0.5
"""Largest difference of a log-probability between a run and one of other shapes: one or two steps
of a logit in bf16, which are 0.125 to 0.25 wide. It is twice what vLLM's own prefix cache differs
from a cold run by, where that was measured and is more. What is to be the same is compared to the
bit elsewhere."""


def surroundings(threads: int) -> None:
    """Variables that vLLM reads, as far as the caller has not set them."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
    }.items():
        os.environ.setdefault(name, value)


class Bench:
    """What all phases share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work.resolve()
        self.wanted = set(options.phases.split(","))
        self.lengths = [int(length) for length in options.lengths.split(",")]
        self.runs: dict[str, Run] = {}
        self.checks: dict[str, bool] = {}
        self.facts: dict[str, Any] = {}
        self.rows = Rows()
        self.noise = NOISE
        from transformers import AutoTokenizer

        self.texts = Texts(AutoTokenizer.from_pretrained(options.model))
        self.prompts = prompts(self.texts, self.lengths, options.each)

    def block(self) -> int:
        """Tokens of a block."""
        return int(self.options.block_size)

    def restored(self, length: int, leave_one: bool = False) -> int:
        """Tokens of a prompt that whole blocks hold."""
        return (length - int(leave_one)) // self.block() * self.block()

    def daemon(self, name: str) -> Daemon:
        """A daemon with a store of its own, empty unless an earlier run is taken over."""
        folder = self.work / name
        if not self.options.keep:
            shutil.rmtree(folder, ignore_errors=True)
        return Daemon(self.options.kvtierd, folder, self.options.level, self.options.host_mib)

    def connector(self, daemon: Daemon) -> dict[str, Any]:
        """`kv_transfer_config` of our connector."""
        return {
            "kv_connector": "KvtierConnector",
            "kv_connector_module_path": "kvtier.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"socket": str(daemon.socket)},
        }

    def phase(
        self,
        name: str,
        steps: list[dict[str, Any]],
        transfer: dict[str, Any] | None = None,
        **engine: Any,
    ) -> dict[str, Run]:
        """Runs a phase in a process of its own and returns its runs by name."""
        arguments = {
            "model": str(self.options.model),
            "dtype": "bfloat16",
            "max_model_len": 8192,
            "max_num_batched_tokens": self.options.batched_tokens,
            "max_num_seqs": 16,
            "block_size": self.block(),
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "distributed_executor_backend": "uni",
            "seed": 0,
            **engine,
        }
        if transfer is not None:
            arguments["kv_transfer_config"] = transfer
        plan = {"engine": arguments, "warm": [64, 1024], "steps": steps}
        out, log = self.work / f"{name}.out.json", self.work / f"{name}.log"
        if not (self.options.keep and out.exists()):
            import_engine()
            if not run_forked(plan, out, log):
                raise SystemExit(f"phase {name} failed, see {log}")
        result = json.loads(out.read_text())
        print(f"{name}: {', '.join(result['runs'])}", flush=True)
        for pid in result["started"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 15)
        self.facts[f"{name}.init_s"] = round(result["init_s"], 1)
        for count in ("preemptions", "failed_pages"):
            if result[count]:
                self.facts[f"{name}.{count}"] = result[count]
        runs: dict[str, Run] = result["runs"]
        return runs

    def run_step(
        self, name: str, asked: list[dict[str, Any]] | None = None, **more: Any
    ) -> dict[str, Any]:
        """A step that runs prompts."""
        asked = self.prompts if asked is None else asked
        return {"do": "run", "name": name, "prompts": asked, "max_tokens": TOKENS, **more}

    def check(self, name: str, holds: bool) -> None:
        """Notes a check."""
        self.checks[name] = bool(holds)
        if not holds:
            print(f"  FAILED {name}", flush=True)

    def check_restored(self, name: str, run: Run, leave_one: bool = False) -> None:
        """Every prompt was restored as far as whole blocks go."""
        wanted = [self.restored(result["length"], leave_one) for result in run]
        self.check(f"{name}.restored", [result["cached"] for result in run] == wanted)

    def check_identical(self, name: str, run: Run, reference: Run) -> None:
        """Every prompt gave the bits of the reference."""
        self.facts[f"{name}.identical"] = f"{identical(run, reference)} of {len(run)}"
        self.facts[f"{name}.max_dlogprob"] = round(distance(run, reference), 6)
        self.check(f"{name}.identical", identical(run, reference) == len(run))

    def check_close(self, name: str, run: Run, reference: Run) -> None:
        """Every prompt ended well, and is as close to the reference as other shapes let it."""
        ended = all(result["finish"] == "length" for result in run)
        apart = distance(run, reference)
        self.facts[f"{name}.max_dlogprob"] = round(apart, 6)
        self.check(f"{name}.close", ended and apart <= self.noise)


def cold(bench: Bench) -> None:
    """What recomputing costs, and what it gives."""
    alone = {**bench.run_step("preempted.alone", cramped(bench)), "max_tokens": bench.block()}
    steps = [bench.run_step("cold"), *([] if bench.options.quick else [alone])]
    bench.runs |= bench.phase("cold", steps)


def apc(bench: Bench) -> None:
    """vLLM's own prefix cache."""
    steps = [bench.run_step("apc.first"), bench.run_step("apc")]
    bench.runs |= bench.phase("apc", steps, enable_prefix_caching=True)
    bench.check_restored("apc", bench.runs["apc"], leave_one=True)
    apart = distance(bench.runs["apc"], bench.runs["apc.first"])
    bench.facts["apc.max_dlogprob"] = round(apart, 6)
    bench.noise = max(NOISE, 2 * apart)


def store(bench: Bench, daemon: Daemon) -> None:
    """Saves everything once."""
    daemon.start()
    bench.runs |= bench.phase("store", [bench.run_step("store")], bench.connector(daemon))
    if "cold" in bench.runs:
        bench.check_identical("store", bench.runs["store"], bench.runs["cold"])


def restore(bench: Bench, daemon: Daemon) -> None:
    """Restores from the device after a restart, and from host memory after that."""
    for again in range(bench.options.repeat):
        daemon.restart()
        tag = "restore" if again == 0 else f"restore.{again + 1}"
        salted = [{**bench.prompts[0], "salt": "another tenant"}]
        steps = [
            bench.run_step(f"{tag}.nvme"),
            bench.run_step(f"{tag}.host"),
            bench.run_step(f"{tag}.salt", salted),
        ]
        bench.runs |= bench.phase(tag, steps, bench.connector(daemon))
        bench.check(f"{tag}.salt.missed", bench.runs[f"{tag}.salt"][0]["cached"] == 0)
        for run in (f"{tag}.nvme", f"{tag}.host"):
            bench.check_restored(run, bench.runs[run])
            if "apc" in bench.runs:
                bench.check_identical(run, bench.runs[run], bench.runs["apc"])


def chunked(bench: Bench, daemon: Daemon) -> None:
    """Prefill in several steps: blocks of each are saved. What is loaded in another engine gives
    the bits of what is loaded in this one, from the same KV."""
    asked = [prompt for prompt in prompts(bench.texts, bench.lengths, 1, first=400)]
    daemon.restart()
    link = bench.connector(daemon)
    steps = [bench.run_step("chunked.first", asked), bench.run_step("chunked.again", asked)]
    bench.runs |= bench.phase("chunked", steps, link, max_num_batched_tokens=1024)
    daemon.restart()
    bench.runs |= bench.phase("chunked.nvme", [bench.run_step("chunked.nvme", asked)], link)
    again = bench.runs["chunked.again"]
    bench.check_close("chunked", again, bench.runs["chunked.first"])
    for run in ("chunked.again", "chunked.nvme"):
        bench.check_restored(run, bench.runs[run])
    bench.check_identical("chunked.nvme", bench.runs["chunked.nvme"], again)


def cramped(bench: Bench) -> list[dict[str, Any]]:
    """Four prompts that grow by a block while they generate."""
    size = bench.block()
    return prompts(bench.texts, [12 * size - size // 4], 4, first=500)


def preempted(bench: Bench, daemon: Daemon) -> None:
    """Memory for three of them, until they grow: one is preempted, and loads what was saved."""
    daemon.restart()
    step = bench.run_step("preempted", cramped(bench), together=True)
    # A block of all is what vLLM keeps for itself.
    step["max_tokens"], blocks = bench.block(), 3 * 12 + 2
    bench.runs |= bench.phase(
        "preempted",
        [step],
        bench.connector(daemon),
        num_gpu_blocks_override=blocks,
        # vLLM wants memory for the longest request that it takes.
        max_model_len=14 * bench.block(),
    )
    bench.check("preempted.happened", bench.facts.get("preempted.preemptions", 0) > 0)
    if "preempted.alone" in bench.runs:
        run, alone = bench.runs["preempted"], bench.runs["preempted.alone"]
        bench.check_close("preempted", run, alone)


def shared(bench: Bench, daemon: Daemon) -> None:
    """Prompts with a common prefix, all at once: first computed, then restored elsewhere."""
    common, rest = 2048, 300
    asked = [
        {"name": f"shared#{n}", "ids": bench.texts.prompt(100 + n, common + rest + n, common)}
        for n in range(6)
    ]
    daemon.restart()
    link = bench.connector(daemon)
    bench.runs |= bench.phase(
        "shared.store", [bench.run_step("shared.store", asked, together=True)], link
    )
    daemon.restart()
    bench.runs |= bench.phase(
        "shared.restore",
        [bench.run_step("shared.restore", asked, together=True)],
        link,
        enable_prefix_caching=True,
    )
    run = bench.runs["shared.restore"]
    bench.check_restored("shared", run)
    bench.check_close("shared", run, bench.runs["shared.store"])


def killed(bench: Bench, daemon: Daemon) -> None:
    """The daemon dies while it loads, slowed down for that, and comes back."""
    longest = max(bench.lengths)
    asked = [prompt for prompt in bench.prompts if len(prompt["ids"]) == longest][:1]
    pid = daemon.restart('disk.read_limit="8 MiB"')
    steps = [
        {"do": "kill", "pid": pid},
        bench.run_step("killed", asked),
        {"do": "start", "command": daemon.command(), "ready": str(daemon.socket)},
        # The first prompt finds the session lost; by the second it has been opened again.
        bench.run_step("killed.next", prompts(bench.texts, [200], 1, first=200)),
        bench.run_step("killed.back", asked),
    ]
    bench.runs |= bench.phase("killed", steps, bench.connector(daemon))
    daemon.stop()
    reference = [r for r in bench.runs.get("cold", ()) if r["name"] == asked[0]["name"]]
    if reference:
        bench.check_identical("killed", bench.runs["killed"], reference)
    # What was to be loaded is no longer counted as such once it has failed.
    bench.check("killed.was_loading", bench.facts.get("killed.failed_pages", 0) > 0)
    bench.check_restored("killed.back", bench.runs["killed.back"])


def absent(bench: Bench) -> None:
    """An engine that starts without a daemon."""
    daemon = bench.daemon("absent.store")
    asked = bench.prompts[:1]
    steps = [
        bench.run_step("absent", asked),
        {"do": "start", "command": daemon.command(), "ready": str(daemon.socket)},
        bench.run_step("absent.wait", prompts(bench.texts, [3000], 3, first=300)),
        bench.run_step("absent.save", asked),
        bench.run_step("absent.load", asked),
    ]
    bench.runs |= bench.phase("absent", steps, bench.connector(daemon))
    reference = bench.runs.get("cold", [])[:1]
    if reference:
        bench.check_identical("absent", bench.runs["absent"], reference)
    bench.check("absent.computed", bench.runs["absent"][0]["cached"] == 0)
    bench.check_restored("absent.load", bench.runs["absent.load"])


def others(bench: Bench, daemon: Daemon) -> None:
    """Engines whose blocks mean something else find nothing, and keep their own."""
    asked = bench.prompts[:1]
    for name, engine in (
        ("float32", {"dtype": "float32"}),
        ("block", {"block_size": bench.block() // 2}),
    ):
        daemon.restart()
        steps = [bench.run_step(f"others.{name}", asked), bench.run_step(f"{name}.own", asked)]
        runs = bench.phase(f"others.{name}", steps, bench.connector(daemon), **engine)
        bench.check(f"others.{name}.missed", runs[f"others.{name}"][0]["cached"] == 0)
        bench.check(f"others.{name}.own", runs[f"{name}.own"][0]["cached"] > 0)


def forget_pages(folder: Path) -> None:
    """Takes the files of a folder out of the page cache: what is read then comes from the
    device, as after a restart."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peer(bench: Bench) -> None:
    """vLLM's own connector that keeps files, over the same prompts."""
    folder = bench.work / "peer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    bench.runs |= bench.phase("peer.store", [bench.run_step("peer.store")], transfer)
    forget_pages(folder)
    steps = [bench.run_step("peer.nvme"), bench.run_step("peer.host")]
    bench.runs |= bench.phase("peer", steps, transfer)
    # What it restores is its own affair; what it gives is compared all the same.
    bench.facts["peer.cached"] = [result["cached"] for result in bench.runs["peer.nvme"]]
    if "apc" in bench.runs:
        same = identical(bench.runs["peer.nvme"], bench.runs["apc"])
        bench.facts["peer.identical"] = f"{same} of {len(bench.runs['apc'])}"


def rows(bench: Bench) -> None:
    """Time to the first token of every way, and how many times faster it is than computing."""

    def times(run: str, length: int, field: str) -> list[float]:
        return [1000 * r[field] for r in of_length(bench.runs[run], length)]

    measured = ["cold", "apc", "store"]
    ways = ("restore.nvme", "restore.host", "peer.nvme", "peer.host")
    for length in bench.lengths:
        for run in (*measured, *ways):
            if run not in bench.runs:
                continue
            for field, unit, suffix in (("ttft_s", "ms", ""), ("ttft_cpu_s", "ms cpu", "_cpu")):
                best = None
                if run not in measured and "apc" in bench.runs:
                    best = (f"vllm.ttft{suffix}.apc.{length}", times("apc", length, field))
                name = f"vllm.ttft{suffix}.{run}.{length}"
                bench.rows.add(name, unit, times(run, length, field), best)
            if run not in ("cold", "store") and "cold" in bench.runs:
                pairs = zip(
                    times("cold", length, "ttft_s"), times(run, length, "ttft_s"), strict=True
                )
                bench.rows.add(
                    f"vllm.speedup.{run}.{length}", "x", [before / now for before, now in pairs]
                )
    for name, holds in bench.checks.items():
        bench.rows.add(f"vllm.check.{name}", "0 or 1", [float(holds)])


def import_engine() -> None:
    """Imports for every phase what an engine imports when it starts."""
    for name in (
        "vllm.entrypoints.llm",
        "vllm.v1.engine.llm_engine",
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.attention.backends.cpu_attn",
        "vllm.model_executor.models.llama",
        "vllm.distributed.kv_transfer.kv_connector.factory",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--kvtierd", type=Path, required=True, help="executable of the daemon")
    parser.add_argument("--work", type=Path, required=True, help="folder on the device")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--phases", default=PHASES)
    parser.add_argument("--lengths", default="520,2060,6000", help="tokens of the prompts")
    parser.add_argument("--each", type=int, default=3, help="prompts of each length")
    parser.add_argument("--repeat", type=int, default=1, help="restores, each after a restart")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--batched-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of the engine")
    parser.add_argument("--level", default="lossless", help="disk.level of the daemon")
    parser.add_argument("--host-mib", type=int, default=2048, help="host memory of the daemon")
    parser.add_argument(
        "--keep", action="store_true", help="take over phases that WORK has results of"
    )
    parser.add_argument("--quick", action="store_true", help="one short prompt, fewer phases")
    given = parser.parse_args()
    if given.quick:
        given.lengths, given.each = "520,2060", 1
        given.phases = "cold,apc,store,restore,killed"
    return given


def main() -> int:
    """Runs the phases that are asked for."""
    given = options()
    given.work.mkdir(parents=True, exist_ok=True)
    surroundings(given.threads)
    bench = Bench(given)

    wanted = bench.wanted
    daemon = bench.daemon("store")
    try:
        if "cold" in wanted:
            cold(bench)
        if "apc" in wanted:
            apc(bench)
            # The first pass computes as a cold run does, where there is no other.
            bench.runs.setdefault("cold", bench.runs["apc.first"])
        if wanted & {"store", "restore", "killed", "others"}:
            store(bench, daemon)
        if "restore" in wanted:
            restore(bench, daemon)
        if "chunked" in wanted:
            chunked(bench, daemon)
        if "preempted" in wanted:
            preempted(bench, daemon)
        if "shared" in wanted:
            shared(bench, daemon)
        if "others" in wanted:
            others(bench, daemon)
        if "killed" in wanted:
            killed(bench, daemon)
    finally:
        daemon.stop()
    if "absent" in wanted:
        absent(bench)
    if "peer" in wanted:
        peer(bench)
    rows(bench)
    for row in bench.rows.rows:
        print(f"{row['name']:48} {row['median']:10} {row['unit']}")
    print(json.dumps(bench.facts, indent=1))
    if given.json is not None:
        bench.rows.write(given.json, "vllm-cpu", bench.work)
    return 0 if all(bench.checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
