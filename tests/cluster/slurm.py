"""SLURM on the test hosts: slurmctld on `login`, slurmd on both nodes."""

import re
import shlex
from pathlib import Path

from cluster.hosts import ADDRESSES, LOGIN, NODES, wait_for

FINISHED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
CONFIG = """\
ClusterName=test
SlurmctldHost={login}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for cred_expire seconds; the default is 120.
AuthInfo=socket={folder}/munge.socket,cred_expire=8
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
# How long a node may not answer before its jobs are requeued; the default is 300.
SlurmdTimeout={node_timeout}
# A terminated job is killed after so many seconds.
KillWait=30
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


class Slurm:
    """A running SLURM.

    Args:
        hosts: The `Hosts`.
        folder: For its configuration, state and logs.
        node_timeout: Seconds without an answer after which a node is down.
    """

    def __init__(self, hosts, folder, node_timeout=30):
        self.hosts = hosts
        self.folder = folder
        self._node_timeout = node_timeout

    def start(self):
        """Start its daemons and wait until both nodes are idle; they end with their hosts."""
        (self.folder / "state").mkdir()
        nodes = [f"NodeName={name} NodeAddr={ADDRESSES[name]} CPUs=2 RealMemory=4000 State=UNKNOWN" for name in NODES]
        config = CONFIG.format(
            folder=self.folder,
            login=LOGIN,
            address=ADDRESSES[LOGIN],
            node_timeout=self._node_timeout,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(config, encoding="utf-8")
        key = self.folder / "munge.key"
        self.run(f"umask 077; head -c 1024 /dev/urandom >{key}")
        # One munged for all hosts: they share its socket as they share other files.
        places = " ".join(
            f"--{name}={self.folder}/munge.{suffix}"
            for name, suffix in (("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))
        )
        self.run(f"/usr/sbin/munged --force --key-file={key} {places} 2>{self.folder}/munged.log")
        self.run(f"slurmctld -f {self.folder}/slurm.conf")
        for name in NODES:
            self.start_node(name)
        self.wait_for_nodes()

    def start_node(self, name):
        """Start slurmd on a node."""
        self.hosts.run(name, f"slurmd -N {name} -f {self.folder}/slurm.conf")

    def wait_for_nodes(self):
        """Wait until both nodes are idle."""
        wait_for(lambda: self.node_states() == {"idle"}, lambda: f"idle nodes, not {self.node_states()}")

    def node_states(self):
        """Return the states of the nodes."""
        return set(self.run("sinfo --noheader --Node --format %T", expect=None).stdout.split())

    def run(self, script, **options):
        """Run a bash script on the login host."""
        return self.hosts.run(LOGIN, script, SLURM_CONF=self.folder / "slurm.conf", **options)

    def restore_nodes(self):
        """Start the nodes that were powered off, and wait until both are idle."""
        for name in self.hosts.powered_off():
            self.hosts.power_on(name)
            self.start_node(name)
        self.wait_for_nodes()

    def submit(self, script, *flags, arguments=(), **env):
        """Submit a batch script with arguments, and with these variables in its environment; return its `Job`."""
        words = ["sbatch", "--parsable", f"--output={self.folder}/%j.log", *flags, str(script), *arguments]
        done = self.hosts.run(LOGIN, shlex.join(words), SLURM_CONF=self.folder / "slurm.conf", **env)
        return Job(self, int(done.stdout.split(";")[0]))


class Job:
    """A submitted job, or all tasks of a job array."""

    def __init__(self, slurm, number):
        self.number = number
        self._slurm = slurm

    def fields(self, name):
        """Return the values of one field of `scontrol show job`, one for each task of an array."""
        shown = self._slurm.run(f"scontrol show job {self.number} --oneliner").stdout
        return re.findall(rf"(?:^| ){name}=(\S*)", shown, flags=re.MULTILINE)

    @property
    def state(self):
        """The state of a job that is not an array."""
        (state,) = self.fields("JobState")
        return state

    @property
    def restarts(self):
        """How often the job was requeued."""
        return max(map(int, self.fields("Restarts")))

    def log(self):
        """Return what its tasks have printed so far, standard error included, over all restarts."""
        return "".join(
            Path(path).read_text(encoding="utf-8", errors="replace")
            for path in sorted(set(self.fields("StdOut")))
            if Path(path).exists()
        )

    def wait_for_log(self, text, seconds=600, count=1):
        """Wait until it has printed a text `count` times."""
        self._wait(lambda: self.log().count(text) >= count, f"{text!r} in the log", seconds)

    def wait_for_restart(self, count=1, seconds=600):
        """Wait until it was requeued `count` times."""
        self._wait(lambda: self.restarts >= count, f"restart {count}", seconds)

    def wait_for_progress(self, seconds=600):
        """Wait until training logs another loss."""
        self.wait_for_log(": loss ", seconds, count=self.log().count(": loss ") + 1)

    def wait_for_state(self, state, seconds=600):
        """Wait until it is in a state."""
        self._wait(lambda: set(self.fields("JobState")) == {state}, state, seconds, ended_is_an_error=False)

    def wait(self, state="COMPLETED", seconds=600):
        """Wait for its end, which must be in this state; return its log."""
        self._wait(lambda: set(self.fields("JobState")) <= set(FINISHED), "the end", seconds, ended_is_an_error=False)
        assert set(self.fields("JobState")) == {state}, self.describe()
        return self.log()

    def _wait(self, condition, what, seconds, ended_is_an_error=True):
        def met():
            if condition():
                return True
            ended = set(self.fields("JobState")) <= set(FINISHED)
            assert not (ended and ended_is_an_error) or condition(), f"no {what}: {self.describe()}"
            return False

        wait_for(met, lambda: f"{what}: {self.describe()}", seconds)

    def describe(self):
        """Return its state and the end of its log."""
        return f"job {self.number}: {self.fields('JobState')} {self.fields('Reason')}\n{self.log()[-8000:]}"
