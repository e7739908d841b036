"""One phase of the end-to-end run: an engine in this process, requests one after the other.

Upstairs:   `vllm_e2e.py`, in a process for each phase.
Downstairs: vLLM, through `LLMEngine.step`, so that the time to the first token is the engine's.

A plan: {"engine": keyword arguments of LLM, "warm": [lengths], "steps": [...]}, a step is
  {"do": "run", "name", "prompts": [{"name", "ids", "salt"}], "max_tokens", "together": bool}
  {"do": "kill", "pid"}       in the midst of the next run: after its first load has begun
  {"do": "start", "command", "ready"}   a process, and the path whose appearance says it serves
What comes of it: {"init_s", "runs": {name: [result of a prompt, ...]}, "started": [pid, ...],
"preemptions"}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

KILL_AFTER_S = 1.0
START_LIMIT_S = 60.0


class Phase:
    """An engine and what it is to do."""

    def __init__(self, plan: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig

        began = time.perf_counter()
        arguments = dict(plan["engine"])
        transfer = arguments.pop("kv_transfer_config", None)
        if transfer:
            arguments["kv_transfer_config"] = KVTransferConfig(**transfer)
        self._llm = LLM(**arguments)
        self._engine = self._llm.llm_engine
        self._sampling = SamplingParams
        self._plan = plan
        self._count = 0
        self._kill: int | None = None
        self.started: list[int] = []
        self.preemptions = 0
        self.failed_pages = 0
        self._watch()
        self.init_s = time.perf_counter() - began

    def _watch(self) -> None:
        """vLLM tells nobody how often it preempts, or what did not load; its scheduler is in this
        process."""
        scheduler = self._engine.engine_core.engine_core.scheduler
        preempt, fail = scheduler._preempt_request, scheduler._handle_invalid_blocks

        def preempted(*arguments: Any, **named: Any) -> Any:
            self.preemptions += 1
            return preempt(*arguments, **named)

        def failed(pages: set[int], *arguments: Any, **named: Any) -> Any:
            self.failed_pages += len(pages)
            return fail(pages, *arguments, **named)

        scheduler._preempt_request = preempted
        scheduler._handle_invalid_blocks = failed

    def go(self) -> dict[str, list[dict[str, Any]]]:
        """Does every step."""
        random_tokens = random.Random(os.urandom(8))
        for length in self._plan["warm"]:
            ids = [random_tokens.randrange(300, 20000) for _ in range(length)]
            self._run([{"name": "warm", "ids": ids}], 4, False)
        runs = {}
        for step in self._plan["steps"]:
            if step["do"] == "kill":
                self._kill = step["pid"] if step["pid"] is not None else self.started[-1]
            elif step["do"] == "start":
                self._start(step)
            else:
                together = step.get("together", False)
                runs[step["name"]] = self._run(step["prompts"], step["max_tokens"], together)
        return runs

    def _start(self, step: dict[str, Any]) -> None:
        Path(step["ready"]).unlink(missing_ok=True)
        process = subprocess.Popen(step["command"], start_new_session=True)
        self.started.append(process.pid)
        until = time.monotonic() + START_LIMIT_S
        while not os.path.exists(step["ready"]):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{step['command'][0]} did not start")
            time.sleep(0.02)

    def _run(self, prompts: list[dict[str, Any]], tokens: int, together: bool) -> list[Any]:
        if together:
            return self._batch(prompts, tokens)
        return [self._batch([prompt], tokens)[0] for prompt in prompts]

    def _batch(self, prompts: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
        parameters = self._sampling(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=5)
        began, cpu = time.perf_counter(), time.process_time()
        results: dict[str, dict[str, Any]] = {}
        last: dict[str, Any] = {}
        for prompt in prompts:
            self._count += 1
            name = f"request-{self._count:06}"
            asked = {"prompt_token_ids": prompt["ids"]}
            if prompt.get("salt"):
                asked["cache_salt"] = prompt["salt"]
            self._engine.add_request(name, asked, parameters)
            results[name] = {"name": prompt["name"], "length": len(prompt["ids"])}
        if self._kill is not None:
            pid, self._kill = self._kill, None
            threading.Timer(KILL_AFTER_S, os.kill, (pid, signal.SIGKILL)).start()
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                name = next(n for n in results if output.request_id.startswith(n))
                if "ttft_s" not in results[name] and output.outputs[0].token_ids:
                    results[name]["ttft_s"] = time.perf_counter() - began
                    results[name]["ttft_cpu_s"] = time.process_time() - cpu
                last[name] = output
        for name, output in last.items():
            first = output.outputs[0]
            results[name] |= {
                "total_s": time.perf_counter() - began,
                "cached": output.num_cached_tokens,
                "finish": first.finish_reason,
                "tokens": list(first.token_ids),
                "logprobs": [
                    {str(token): value.logprob for token, value in place.items()}
                    for place in first.logprobs or ()
                ],
            }
        return list(results.values())

    def close(self) -> None:
        """Ends the engine, and with it its connector, which waits for its saves."""
        self._engine.engine_core.shutdown()


def run(plan: dict[str, Any], out: Path) -> None:
    """Runs one phase in this process, which can run no other."""
    phase = Phase(plan)
    runs = phase.go()
    phase.close()
    result = {
        "init_s": phase.init_s,
        "runs": runs,
        "started": phase.started,
        "preemptions": phase.preemptions,
        "failed_pages": phase.failed_pages,
    }
    out.write_text(json.dumps(result))


def run_forked(plan: dict[str, Any], out: Path, log: Path) -> bool:
    """Runs one phase in a child, which has all that this process has imported. True when it
    ended well."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        run(plan, out)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
