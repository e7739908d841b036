"""KV connector of vLLM: keeps blocks of its KV cache in the kvtier daemon of the host.

Upstairs:   vLLM, by `kv_connector="KvtierConnector", kv_connector_module_path="kvtier.vllm"`.
Downstairs: `connector`, which is imported when the class is asked for.

    scheduler process                        each worker process
    connector.KvtierConnector                connector.KvtierConnector
      scheduler.SchedulerSide                  worker.WorkerSide
        tracker, chain, identity (pure)          memory: where blocks lie
        link: lookups, keys                      link: loads and saves

Nothing here imports vLLM or torch before `KvtierConnector` is named, so the logic is tested
without either. No module keeps an object of foreign code as a global: vLLM looks into all of
them when it starts.
"""

from typing import Any

__all__ = ["KvtierConnector"]


def __getattr__(name: str) -> Any:
    if name == "KvtierConnector":
        from .connector import KvtierConnector

        return KvtierConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
