# SPDX-License-Identifier: Apache-2.0
"""A prefill/decode pair of unmodified vLLM on the virtual NPU serves the same HTTP requests twice: stock, then overlay.

One prefill node (kv_producer, TP1) stays up for both runs. The decode node (kv_consumer, DP4 TP1 EP4, recompute
scheduler, eager, A3) is started once as stock and once with dp_sync_patch. Tokens are compared request by request, all
other figures come from the decode node's ledgers. The result is a table and `<output>/report.json`.

Exit status: 0 if the report shows what the overlay promises, 1 if not, 2 if it could not be run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil
from ledger_report import LedgerError, build_report, failures, read_figures
from load import LoadResult, make_requests, run_load

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
MODEL = "toy"
OVERLAY_PLUGINS = "dp_sync_patch"
DP_SIZE = 4
# Small enough that a rank sometimes runs out of KV blocks and the recompute scheduler hands a request back: 3 blocks of
# 128 tokens are the longest request (max_model_len), one block is vLLM's own.
MAX_MODEL_LEN = 384
DECODE_KV_BLOCKS = 4
PREFILL_KV_BLOCKS = 64
START_TIMEOUT_S = 420
LOG_LINES, CAUSE_LINES = 15, 6
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"\] [\w.]*(Error|Exception): |^(\(\w+ pid=\d+\) )?[\w.]*(Error|Exception): ")
# Below the ports that the kernel gives to whoever asks for any (ip_local_port_range), so that only those who ask for
# one of these can take it before the server that is meant to have it.
PORTS = range(20000, 29000)
# Stock picks ports for its groups and binds them seconds later; by then another process may have one of them.
_PORT_TAKEN = re.compile(r"EADDRINUSE|address (is )?already in use", re.IGNORECASE)


def installed_stock_plugins() -> str:
    """VLLM_PLUGINS of a node without the overlay: all that vllm-ascend brings, which differs by version."""
    try:
        found = importlib.metadata.distribution("vllm-ascend").entry_points
    except importlib.metadata.PackageNotFoundError:  # check_installation says so
        return ""
    return ",".join(sorted(entry.name for entry in found if entry.group.startswith("vllm.")))


STOCK_PLUGINS = installed_stock_plugins()


class DemoError(Exception):
    """The demo could not be run; the text says why and what to do."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


STARTED = time.monotonic()


@dataclass(eq=False)
class Process:
    """A child in a process group of its own, with its output in a log file.

    `companions` are useless without it: they are started again when it is.
    """

    name: str
    command: list[str]
    log: Path
    env: dict[str, str]
    popen: subprocess.Popen[bytes] | None = None
    members: dict[int, psutil.Process] = field(default_factory=dict)
    companions: list[Process] = field(default_factory=list)

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, start_new_session=True
            )

    def returncode(self) -> int | None:
        assert self.popen is not None
        return self.popen.poll()

    def tail(self) -> str:
        """The first exception of the log, which is usually the cause, and the last lines."""
        lines = [_COLOUR.sub("", line) for line in self.log.read_text(errors="replace").splitlines()]
        causes = [index for index, line in enumerate(lines) if _EXCEPTION.search(line)]
        shown = lines[-LOG_LINES:]
        if causes and causes[0] < len(lines) - LOG_LINES:
            shown = [*lines[causes[0] : causes[0] + CAUSE_LINES], "...", *shown]
        return "\n".join("    " + line[:400] for line in shown)

    def lost_a_port(self) -> bool:
        """Whether its log says that another process has taken a port that it had picked."""
        return _PORT_TAKEN.search(self.log.read_text(errors="replace")) is not None

    def start_again(self) -> None:
        """Starts anew one that ended while it started, without the ledgers of the ranks that ended."""
        self.stop()
        ledger = self.env.get("VIRTUAL_NPU_LEDGER_DIR")
        for path in Path(ledger).iterdir() if ledger else ():
            path.unlink()
        self.log.rename(self.log.with_suffix(".first.log"))
        self.members.clear()
        self.start()

    def remember(self) -> None:
        """Notes all descendants, so that one whose parent dies first can still be found by its id."""
        if self.popen is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.popen.pid).children(recursive=True):
                self.members[process.pid] = process

    def stop(self, grace_s: float = 20.0) -> None:
        """Ends the child and all its descendants: a polite signal to the child, then SIGKILL by process id."""
        if self.popen is None:
            return
        self.remember()
        if self.popen.poll() is None:
            self.popen.terminate()
        members = list(self.members.values())
        self._wait_for_the_end(members, grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is gone when all of it has ended
            os.killpg(self.popen.pid, signal.SIGKILL)
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # psutil compares the creation time, so a reused id is not hit
        self._wait_for_the_end(members, 10.0)
        self.popen = None

    def _wait_for_the_end(self, members: list[psutil.Process], timeout_s: float) -> None:
        assert self.popen is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and (self.popen.poll() is None or any(map(_alive, members))):
            time.sleep(0.05)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Cluster:
    """All children of the demo; leaving the context ends them, in reverse order."""

    def __init__(self) -> None:
        self.processes: list[Process] = []

    def start(self, process: Process) -> Process:
        self.processes.append(process)
        process.start()
        return process

    def stop(self, process: Process) -> None:
        process.stop()
        self.processes.remove(process)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave half of them behind.
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        for process in reversed(self.processes):
            process.remember()
            if process.popen is not None and process.popen.poll() is None:
                process.popen.terminate()
        for process in reversed(self.processes):
            process.stop()

    def wait_until_ready(self, waiting: dict[Process, str], timeout_s: float = START_TIMEOUT_S) -> None:
        """Polls the URLs until all answer. Raises DemoError with the log's last lines when one ends or is too slow.

        One that ends because another process has taken a port that stock had picked is started again, once.
        """
        pending = dict(waiting)
        again: set[Process] = set()
        deadline = time.monotonic() + timeout_s
        while pending:
            for process in pending.keys() - again:
                together = [*process.companions, process]
                if any(one.returncode() is not None and one.lost_a_port() for one in together):
                    say(f"{process.name} found a port taken that it had picked; starting it again")
                    again.add(process)
                    for one in together:
                        one.stop()
                    for one in together:
                        one.start_again()
            for process, url in list(pending.items()):
                self.check()
                process.remember()
                if _answers(url):
                    say(f"{process.name} is ready")
                    del pending[process]
            if pending and time.monotonic() > deadline:
                slow = next(iter(pending))
                raise DemoError(f"{slow.name} was not ready after {timeout_s:.0f} s. Its log ends:\n{slow.tail()}")
            time.sleep(0.5)

    def check(self) -> None:
        """Raises DemoError if a child has ended."""
        for process in self.processes:
            code = process.returncode()
            if code is not None:
                raise DemoError(f"{process.name} ended with status {code}. {process.log} ends:\n{process.tail()}")


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as response:
            return int(response.status) == 200
    except (urllib.error.URLError, OSError):
        return False


def free_port(taken: set[int]) -> int:
    """A port of `PORTS` that is free on the loopback address and not in `taken`, which it joins."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            if port not in taken:
                probe.bind((HOST, port))
                taken.add(port)
                return port


def check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = f"port {port} on {HOST} cannot be used ({error.strerror}); choose another --port"
            raise DemoError(reason) from error


def check_installation(runs: list[str]) -> str:
    """The installed vllm-ascend version. Raises DemoError naming what is missing."""
    versions = {}
    for name in ("vllm", "vllm-ascend", "torch-npu", *(["dp-sync-patch"] if "overlay" in runs else [])):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise DemoError(f"{name} is not installed in {sys.prefix}; `make demo` sets everything up") from error
    backends = {entry.name for entry in importlib.metadata.entry_points(group="torch.backends")}
    if "virtual_npu" not in backends:
        compiler = "" if shutil.which("g++") else " A C++ compiler is needed first: there is no g++ on PATH."
        raise DemoError(f"the virtual NPU is not attached to {sys.prefix}; `make demo` builds it.{compiler}")
    return versions["vllm-ascend"]


def node_environment(ledger: Path) -> dict[str, str]:
    """Environment of a vLLM node. Settings of the caller that would change what runs are left out."""
    prefixes = ("VLLM_", "DP_SYNC_PATCH_", "VIRTUAL_NPU_", "ASCEND_", "HCCL_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
    env.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    return env | {
        "PYTHONPATH": str(HERE),  # for the KV connector
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_USE_V1": "1",
        # What vLLM remembers about models differs between its versions; each environment keeps its own.
        "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "vllm_cache"),
        # Engines forked from the API server share its imports, which take half a minute per process otherwise.
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
        # Inductor's pool of compile workers is of no use in eager mode and costs each process another import.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": HOST,
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TASK_QUEUE_ENABLE": "0",
        "VIRTUAL_NPU_SOC": "Ascend910_9391",
        "VIRTUAL_NPU_SHAPES": "relaxed",  # the toy's hidden size is below what an A3 allows
        "VIRTUAL_NPU_LEDGER_DIR": str(ledger),
    }


class Demo:
    def __init__(self, output: Path, port: int | None, requests: int, runs: list[str]) -> None:
        self.output = output
        self.model = output / "model"
        self.transfers = output / "kv"
        self.requests = make_requests(requests)
        self.runs = runs
        self.resubmitted: dict[str, int] = {}
        taken: set[int] = set()
        self.proxy_port = port or free_port(taken)
        self.prefill_port = free_port(taken)
        self.decode_port = free_port(taken)

    def prepare(self) -> None:
        """An output directory without the results of an earlier run, and with the model in it."""
        for name in ("model", "kv", "prefill", "stock", "overlay"):
            shutil.rmtree(self.output / name, ignore_errors=True)
        (self.output / "report.json").unlink(missing_ok=True)
        self.transfers.mkdir(parents=True)
        say("writing the toy Qwen3-MoE checkpoint")
        env = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        command = [sys.executable, str(HERE / "toy_model.py"), str(self.model)]
        result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise DemoError(f"the toy checkpoint could not be written:\n{result.stderr}")

    def node(self, name: str, run: str, port: int, role: str, env: dict[str, str], arguments: list[str]) -> Process:
        """One `vllm serve`; `env` and `arguments` hold what differs between the nodes."""
        ledger = self.output / run / "ledger"
        ledger.mkdir(parents=True)
        transfer = {
            "kv_connector": "FileKVConnector",
            "kv_connector_module_path": "kv_connector",
            "kv_role": role,
            "kv_connector_extra_config": {"directory": str(self.transfers)},
        }
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model)),
            *("--served-model-name", MODEL, "--host", HOST, "--port", str(port)),
            *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--tensor-parallel-size", "1"),
            *("--enforce-eager", "--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(transfer)),
            *arguments,
        ]
        return Process(name, command, self.output / run / "node.log", node_environment(ledger) | env)

    def prefill_node(self) -> Process:
        env = {"VLLM_PLUGINS": STOCK_PLUGINS, "ASCEND_RT_VISIBLE_DEVICES": str(DP_SIZE)}
        arguments = ["--max-num-batched-tokens", "512", "--num-gpu-blocks-override", str(PREFILL_KV_BLOCKS)]
        return self.node("prefill node", "prefill", self.prefill_port, "kv_producer", env, arguments)

    def decode_node(self, run: str) -> Process:
        counters = self.output / run / "counters"
        counters.mkdir(parents=True)
        env = {
            "VLLM_PLUGINS": STOCK_PLUGINS if run == "stock" else OVERLAY_PLUGINS,
            "ASCEND_RT_VISIBLE_DEVICES": ",".join(map(str, range(DP_SIZE))),
            # One API server shows the counters of its engines through this directory only.
            "PROMETHEUS_MULTIPROC_DIR": str(counters),
        }
        arguments = [
            *("--data-parallel-size", str(DP_SIZE), "--enable-expert-parallel", "--api-server-count", "1"),
            # The engine is its own worker, which is the default of 0.11.0 only; half of the processes.
            *("--distributed-executor-backend", "uni"),
            *("--max-num-batched-tokens", "64", "--num-gpu-blocks-override", str(DECODE_KV_BLOCKS)),
            *("--additional-config", json.dumps({"recompute_scheduler_enable": True})),
        ]
        return self.node(f"decode node ({run})", run, self.decode_port, "kv_consumer", env, arguments)

    def proxy(self, run: str) -> Process:
        command = [
            *(sys.executable, str(HERE / "proxy.py"), "--port", str(self.proxy_port), "--host", HOST),
            *("--prefill", f"http://{HOST}:{self.prefill_port}", "--decode", f"http://{HOST}:{self.decode_port}"),
        ]
        return Process("proxy", command, self.output / run / "proxy.log", dict(os.environ))

    def serve(self, cluster: Cluster, run: str, fresh: dict[Process, str]) -> list[LoadResult]:
        """Starts the decode node and the proxy, sends the load, stops both. Raises DemoError if a request failed."""
        say(f"{run}: starting the decode node, DP{DP_SIZE} TP1 EP{DP_SIZE}")
        decode = cluster.start(self.decode_node(run))
        cluster.wait_until_ready({**fresh, decode: f"http://{HOST}:{self.decode_port}/health"})
        proxy = cluster.start(self.proxy(run))
        base_url = f"http://{HOST}:{self.proxy_port}"
        cluster.wait_until_ready({proxy: f"{base_url}/health"}, 60)

        done = 0

        def progress(result: LoadResult) -> None:
            nonlocal done
            done += 1
            outcome = (result.error or f"{len(result.token_ids)} tokens")[:120]
            say(f"{run}: request {result.index:2} done ({outcome}), {done} of {len(self.requests)}")

        results = asyncio.run(run_load(base_url, MODEL, self.requests, on_done=progress))
        cluster.check()
        document = json.dumps([asdict(result) for result in results], indent=1)
        (self.output / run / "requests.json").write_text(document + "\n", encoding="utf-8")
        failed = [result for result in results if result.error]
        if failed:
            reason = f"{run}: {len(failed)} of {len(results)} requests failed, the first with: {failed[0].error}"
            raise DemoError(f"{reason}\n{decode.log} ends:\n{decode.tail()}")
        self.resubmitted[run] = int(json.loads(_get(f"{base_url}/health"))["resubmitted"])
        self._wait_until_idle(self.output / run / "ledger")
        time.sleep(2.5)  # the overlay's counters are copied every 2 s
        metrics = _get(f"http://{HOST}:{self.decode_port}/metrics")
        (self.output / run / "metrics.txt").write_bytes(metrics)
        say(f"{run}: stopping the decode node")
        cluster.stop(proxy)
        cluster.stop(decode)
        return results

    @staticmethod
    def _wait_until_idle(ledger: Path, quiet_s: float = 1.5, timeout_s: float = 30.0) -> None:
        """Ranks go on with dummy steps until their vote, at most 32 steps; an idle node writes nothing to its ledgers.

        Raises DemoError if it goes on for `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        sizes: list[int] = []
        since = time.monotonic()
        while time.monotonic() - since < quiet_s:
            found = sorted(path.stat().st_size for path in ledger.iterdir())
            if found != sizes:
                sizes, since = found, time.monotonic()
            if time.monotonic() > deadline:
                raise DemoError(f"the decode node did not become idle within {timeout_s:.0f} s after the last request")
            time.sleep(0.1)

    def run(self, stock_version: str) -> int:
        results: dict[str, list[LoadResult]] = {}
        with Cluster() as cluster:
            self.prepare()
            say("starting the prefill node")
            prefill = cluster.start(self.prefill_node())
            fresh = {prefill: f"http://{HOST}:{self.prefill_port}/health"}
            for run in self.runs:
                results[run] = self.serve(cluster, run, fresh)
                fresh = {}
            say("stopping the prefill node")
            cluster.stop(prefill)
        figures = {run: read_figures(self.output / run / "ledger") for run in self.runs}
        if len(self.runs) < 2:
            for run in self.runs:
                print(json.dumps({**asdict(figures[run]), "resubmitted": self.resubmitted[run]}, indent=1))
            return 0
        tokens = {run: [result.token_ids for result in results[run]] for run in self.runs}
        tpot = {run: _median_tpot(results[run]) for run in self.runs}
        report = build_report(stock_version, figures, tokens, tpot)
        report["resubmitted_requests"] = self.resubmitted
        report["seconds"] = round(time.monotonic() - STARTED, 1)
        path = self.output / "report.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print_table(report)
        found = failures(report, figures)
        for sentence in found:
            print(f"FAILED: {sentence}", flush=True)
        print(f"\nReport: {path}, {report['seconds']:.0f} s", flush=True)
        return 1 if found else 0


def _get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as response:
        content: bytes = response.read()
        return content


def _median_tpot(results: list[LoadResult]) -> float:
    return statistics.median(result.tpot_ms for result in results if result.tpot_ms is not None)


def print_table(report: dict[str, Any]) -> None:
    rows = [
        ("DP collectives per decode step", "dp_collectives_per_decode_step", "{:.3f}"),
        ("  the engines' vote, apart", "vote_collectives_per_decode_step", "{:.3f}"),
        ("host blocked in them, us per step", "sync_host_us_per_step", "{:.0f}"),
        ("tokens computed per rank and step", "tokens_computed_per_step", "{:.2f}"),
        ("  share of padding", "padded_token_share", "{:.1%}"),
        ("requests re-submitted (recomputed)", "resubmitted_requests", "{}"),
        ("median TPOT, ms *", "tpot_ms", "{:.1f}"),
    ]
    print(f"\nvllm-ascend {report['stock_version']}: {report['requests']} requests, {report['tokens']} tokens")
    print(f"\n{'decode node, DP4 TP1 EP4':38}{'stock':>12}{'overlay':>12}")
    for title, key, layout in rows:
        print(f"{title:38}{layout.format(report[key]['stock']):>12}{layout.format(report[key]['overlay']):>12}")
    print(f"{'tokens equal':38}{'yes' if report['tokens_equal'] else 'NO':>24}")
    print(f"{'steps with different counts per rank':38}{report['ep_bs_ragged_steps']:>24}")
    print("* virtual NPU, no claim about hardware", flush=True)


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=HERE.parent / "build" / "demo", help="earlier results in it are removed"
    )
    parser.add_argument("--port", type=int, help="port of the proxy (default: a free one)")
    parser.add_argument("--requests", type=int, default=20, help="at least 16")
    parser.add_argument("--only", choices=("stock", "overlay"), help="one run; prints its figures")
    args = parser.parse_args()
    try:
        if args.port is not None:
            check_port(args.port)
        runs = [args.only] if args.only else ["stock", "overlay"]
        stock_version = check_installation(runs)
        signal.signal(signal.SIGTERM, _terminated)
        return Demo(args.output.resolve(), args.port, args.requests, runs).run(stock_version)
    except (DemoError, LedgerError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; all nodes have been stopped", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
