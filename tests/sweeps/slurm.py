"""A Slurm of one node for tests: sbatch, srun, sacct and scontrol as small scripts that run array jobs here."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

COMMON = f"""#!{sys.executable}
import os, pathlib, subprocess, sys
state = pathlib.Path(os.environ["FAKE_SLURM"])

def start(task, after=None):
    job, _, number = task.partition("_")
    env = dict(os.environ, SLURM_JOB_ID=job, SLURM_ARRAY_JOB_ID=job, SLURM_ARRAY_TASK_ID=number,
               SLURM_JOB_NUM_NODES="1", SLURM_NTASKS="1", SLURM_NNODES="1", SLURM_PROCID="0", SLURM_LOCALID="0",
               SLURM_NODEID="0", SLURM_JOB_NODELIST="localhost", SLURM_JOB_NAME="kd")
    wait = f"while kill -0 {{after}} 2>/dev/null; do sleep 0.1; done; " if after else ""
    command = ["bash", "-c", wait + f"exec bash {{state / job}}.sh"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    run = subprocess.Popen(command, env=env, **quiet)
    (state / f"{{task}}.pid").write_text(str(run.pid))
"""
SCRIPTS = {
    "sbatch": """
script = pathlib.Path(sys.argv[-1]).read_text()
job = str(1000 + len(list(state.glob("*.sh"))))
(state / f"{job}.sh").write_text(script)
array = next(line for line in script.splitlines() if line.startswith("#SBATCH --array="))
last = int(array.partition("=")[2].partition("%")[0].partition("-")[2])
for number in range(last + 1):
    start(f"{job}_{number}")
print(f"Submitted batch job {job}")
""",
    "srun": """
arguments = sys.argv[1:]
while arguments[0].startswith("--"):
    del arguments[: 1 if arguments[0] == "--unbuffered" else 2]
task = os.environ["SLURM_ARRAY_JOB_ID"] + "_" + os.environ["SLURM_ARRAY_TASK_ID"]
(state / f"{task}.python").write_text(str(os.getpid()))
log = os.open(state / f"{task}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1)
os.dup2(log, 2)
os.execvp(arguments[0], arguments)
""",
    "sacct": """
print("JobID|State|NodeList")
for file in state.glob("*.pid"):
    alive = pathlib.Path("/proc", file.read_text()).exists()
    print(f"{file.stem}|{'RUNNING' if alive else 'COMPLETED'}|localhost")
""",
    "scontrol": """
task = sys.argv[2]
with open(state / "requeued", "a") as file:
    print(task, file=file)
start(task, after=(state / f"{task}.pid").read_text())
""",
}


class FakeSlurm:
    """The commands in ``folder/bin``, and what they keep in ``folder/slurm``."""

    def __init__(self, folder: Path) -> None:
        self.state, commands = folder / "slurm", folder / "bin"
        self.state.mkdir()
        commands.mkdir()
        for name, text in SCRIPTS.items():
            (commands / name).write_text(COMMON + text)
            (commands / name).chmod(0o755)
        self.environment = {"FAKE_SLURM": str(self.state), "PATH": f"{commands}:{os.environ['PATH']}"}

    def preempt(self, task: str) -> None:
        """As Slurm does before it takes the node away: the signal that sbatch asked for."""
        os.kill(int((self.state / f"{task}.python").read_text()), signal.SIGUSR2)

    def lose(self, task: str) -> None:
        """As when a node breaks: the task's processes are gone, without a word."""
        self.signal(task, signal.SIGKILL)

    def signal(self, task: str, number: signal.Signals) -> None:
        """Send a signal to all processes of a task."""
        os.killpg(int((self.state / f"{task}.pid").read_text()), number)

    def requeued(self) -> list[str]:
        """The tasks that were queued again, in order."""
        file = self.state / "requeued"
        return file.read_text().split() if file.exists() else []

    def stop(self) -> None:
        """End whatever still runs."""
        for file in self.state.glob("*.pid"):
            try:
                os.killpg(int(file.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue


def wait_for(condition, seconds: float = 120.0) -> None:
    """Until ``condition()`` is true. ``TimeoutError`` when it does not become so."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        time.sleep(0.05)
