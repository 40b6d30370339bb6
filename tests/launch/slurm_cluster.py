"""A SLURM cluster of one node, this one, as long as a test needs it: munged, slurmctld and slurmd as its children."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time


class NoCluster(Exception):
    """Why there is none."""


@contextlib.contextmanager
def running(directory, *, cpus=4):
    """Yields the environment in which sbatch, srun and scontrol talk to the cluster; its state lies in `directory`."""
    programs = {name: shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
                for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun")}
    if missing := [name for name, path in programs.items() if path is None]:
        raise NoCluster(f"{', '.join(missing)} not installed (Debian: slurm-wlm and munge)")
    if os.geteuid():
        raise NoCluster("slurmd runs jobs as root only")
    os.chmod(directory, 0o755)
    for part in ("state", "spool", "munge"):
        (directory / part).mkdir()
    os.chmod(directory / "munge", 0o755)
    key, munge_socket = directory / "munge.key", directory / "munge" / "socket"
    key.write_bytes(os.urandom(1024))
    os.chmod(key, 0o600)
    name = socket.gethostname().split(".")[0]
    ports = _free_ports(2)
    configuration = directory / "slurm.conf"
    configuration.write_text(f"""
ClusterName=jaxrd
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge_socket}
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1
JobRequeue=1
KillWait=5
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={name} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=512 State=UNKNOWN
PartitionName=main Nodes={name} Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
""")
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    children = []

    def start(*command):
        with open(directory / f"{command[0]}.out", "wb") as out:
            children.append(subprocess.Popen([programs[command[0]], *command[1:]], env=environment, stdout=out,
                                             stderr=subprocess.STDOUT))

    try:
        start("munged", "--foreground", "--force", f"--socket={munge_socket}", f"--key-file={key}",
              f"--pid-file={directory}/munged.pid", f"--log-file={directory}/munged.log",
              f"--seed-file={directory}/munged.seed")
        _wait(munge_socket.exists, "munged does not start", directory)
        start("slurmctld", "-D", "-f", str(configuration))
        start("slurmd", "-D", "-f", str(configuration), "-N", name)

        def idle():
            state = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
            return "idle" in state.stdout

        _wait(idle, "the node does not become idle", directory)
        yield environment
    finally:
        subprocess.run(["scancel", "--state=RUNNING"], env=environment, capture_output=True)
        subprocess.run(["scancel", "--state=PENDING"], env=environment, capture_output=True)
        for child in reversed(children):
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait(condition, what, directory, seconds=40):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = " ".join(path.read_text(errors="replace")[-400:] for path in sorted(directory.glob("*.out")))
            raise NoCluster(f"{what}: {logs}")
        time.sleep(0.2)


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
