"""A kvtierd of its own for a run: started, stopped, killed and started again.

Upstairs:   `vllm_e2e.py`.
Downstairs: the daemon's executable; it says that it serves by its socket.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

START_LIMIT_S = 60.0
STOP_LIMIT_S = 60.0


class Daemon:
    """One store below `folder`, and at most one process that serves it."""

    def __init__(self, executable: Path, folder: Path, level: str, host_mib: int) -> None:
        self.socket = folder / "kvtierd.sock"
        self._executable = executable
        self._folder = folder
        self._level = level
        self._host_mib = host_mib
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("state", "disk"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def command(self, *settings: str) -> list[str]:
        """How it is started; `settings` are TABLE.SETTING=VALUE."""
        wanted = [
            f'disk.level="{self._level}"',
            'disk.segment_size="64 MiB"',
            'server.metrics="127.0.0.1:0"',
            *settings,
        ]
        command = [str(self._executable), "--socket", str(self.socket)]
        command += ["--state-dir", str(self._folder / "state")]
        command += ["--disk-path", str(self._folder / "disk"), "--disk-capacity", "8 GiB"]
        command += ["--host-capacity", f"{self._host_mib} MiB"]
        for setting in wanted:
            command += ["--set", setting]
        return command

    def start(self, *settings: str) -> int:
        """Starts it and waits until it serves. Its process id."""
        self.socket.unlink(missing_ok=True)
        log = (self._folder / "kvtierd.log").open("ab")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KVTIER_")}
        self._process = subprocess.Popen(
            self.command(*settings), stdout=log, stderr=log, env=environment
        )
        until = time.monotonic() + START_LIMIT_S
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"kvtierd did not start: {self._folder / 'kvtierd.log'}")
            time.sleep(0.02)
        return self._process.pid

    def stop(self) -> None:
        """Ends it as a service manager does: it drains and stops. One that was killed is only
        waited for."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def restart(self, *settings: str) -> int:
        """Stops it and starts it again: host memory is empty then, the device is not."""
        self.stop()
        return self.start(*settings)
