"""Three Linux hosts on this machine: `login`, `node1` and `node2`, on one network of their own.

A host is a set of namespaces: network, processes, host name and mounts. Its files are the machine's, which stands for
shared storage; /dev/shm, /run and /etc/hosts are its own. Nothing is changed outside: when a host's first process ends,
for example because the tests were killed, the kernel ends its other processes and removes its network.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers import ROOT

LOGIN = "login"
NODES = ("node1", "node2")
ADDRESSES = {LOGIN: "10.77.0.10", "node1": "10.77.0.1", "node2": "10.77.0.2"}
HERE = Path(__file__).resolve().parent
TOOLS = ("ip", "mount", "nsenter", "setpriv", "unshare")


def why_unavailable():
    """Return the reason why this machine cannot have such hosts; None if it can."""
    if os.geteuid():
        return "needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (apt-get install iproute2 util-linux)"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return f"cannot create namespaces: {tried.stderr.decode().strip()}" if tried.returncode else None


def wait_for(condition, what, seconds=600):
    """Return the first true value of `condition()`; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {seconds} s still waiting for: {what() if callable(what) else what}"
        time.sleep(0.1)
    return value


class Hosts:
    """The running hosts. As a context, it ends them.

    Args:
        shared: Folder that all hosts see under this path, for their configuration.
    """

    def __init__(self, shared):
        self.shared = shared
        self.small_disk = shared / "disk"  # 4 MiB, mounted on the hosts only
        # DeepSpeed compiles an extension, which takes a minute: once for this Python environment.
        self.extensions = Path(sys.prefix) / "torch_extensions"
        self._first = {}  # name -> (process that ends the host when it ends, id of the host's first process)

    def __enter__(self):
        lines = [f"{address} {name}" for name, address in ADDRESSES.items()]
        (self.shared / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]), encoding="utf-8")
        _write_ssh_files(self.shared)
        self.extensions.mkdir(exist_ok=True)
        self.small_disk.mkdir()
        self.unlock_extensions()
        self._boot(LOGIN)
        self.run(LOGIN, "ip link add br0 type bridge && ip link set br0 up")
        self.run(LOGIN, f"ip address add {ADDRESSES[LOGIN]}/24 dev br0")
        for name in NODES:
            self.power_on(name)
        return self

    def __exit__(self, *_):
        for name in [*NODES, LOGIN]:
            self.power_off(name)

    def power_on(self, name):
        """Start a node: its network, and sshd."""
        pid = self._boot(name)
        self.run(LOGIN, f"ip link delete {name} 2>/dev/null || true")  # of a node that was powered off
        # The other end of the cable is moved by a process that still sees the ids of this machine.
        cable = ["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        subprocess.run(["nsenter", "--net", "--target", str(self._first[LOGIN][1]), *cable], check=True)
        self.run(name, f"ip address add {ADDRESSES[name]}/24 dev eth0 && ip link set eth0 up")
        self.plug_in(name)
        self.run(name, f"/usr/sbin/sshd -f {self.shared}/sshd_config -E {self.shared}/sshd-{name}.log")

    def power_off(self, name):
        """End a host at once, as a power failure does."""
        holder, pid = self._first.pop(name, (None, None))
        if holder is not None:
            os.kill(pid, signal.SIGKILL)
            holder.kill()
            holder.wait()
            holder.stdout.close()

    def unlock_extensions(self):
        """Remove the lock of a rank that was killed while it loaded an extension: others would wait for it."""
        for lock in self.extensions.glob("*/lock"):
            lock.unlink()

    def powered_off(self):
        """Return the names of the nodes that are powered off."""
        return [name for name in NODES if name not in self._first]

    def unplug(self, name):
        """Cut a node off the network."""
        self.run(LOGIN, f"ip link set {name} down")

    def plug_in(self, name):
        """Connect a node to the network."""
        self.run(LOGIN, f"ip link set {name} master br0 up")

    def command(self, name, script, **env):
        """Return the command that runs a bash script on a host, in the repository's root, with only these variables."""
        variables = {
            "HOME": os.environ.get("HOME", "/root"),
            "HF_HUB_OFFLINE": "1",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "PYTHONPATH": str(ROOT),
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_EXTENSIONS_DIR": str(self.extensions),
            **env,
        }
        enter = ["nsenter", "--net", "--uts", "--mount", "--pid", "--target", str(self._first[name][1])]
        settings = [f"{key}={value}" for key, value in variables.items()]
        return [*enter, "env", "--ignore-environment", "--chdir", str(ROOT), *settings, "bash", "-c", script]

    def run(self, name, script, *, expect=0, timeout=400, **env):
        """Run a bash script on a host and return its CompletedProcess; `expect` is the exit code, None for any."""
        done = subprocess.run(
            self.command(name, script, **env),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout,
        )  # fmt: skip
        assert expect in (None, done.returncode), (
            f"{name}: exit code {done.returncode}, not {expect}: {script}\n--- stdout\n{done.stdout[-4000:]}\n"
            f"--- stderr\n{done.stderr[-4000:]}"
        )
        return done

    def seen_from_here(self, path):
        """Return a path under which this process reads a file of the hosts' small disk."""
        return Path(f"/proc/{self._first[LOGIN][1]}/root{path}")

    def kill(self, name, pattern, number=signal.SIGKILL):
        """Send a signal to the processes of a host whose command line matches; return how many there were."""
        done = self.run(name, f"pkill --signal {int(number)} --count --full -- {shlex.quote(pattern)}", expect=None)
        return int(done.stdout)

    def _boot(self, name):
        # unshare ends with this process (pdeathsig), and the host's first process with unshare (kill-child).
        # Nodes start with the mounts of the login host: they share its small disk.
        mounts = ["nsenter", "--mount", "--target", str(self._first[LOGIN][1])] if name != LOGIN else []
        holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *mounts, "unshare", "--net", "--uts", "--mount",
             "--pid", "--mount-proc", "--kill-child", "bash", str(HERE / "host.sh"), name, str(self.shared)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert holder.stdout.readline() == "ready\n", f"{name} did not start"
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text(encoding="utf-8")
        self._first[name] = holder, int(children)
        return int(children)


def _write_ssh_files(shared):
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", shared / key], check=True)
    server = {
        "HostKey": shared / "host_key",
        "AuthorizedKeysFile": shared / "user_key.pub",
        "StrictModes": "no",
        "PermitRootLogin": "prohibit-password",
        "UsePAM": "no",
        "PidFile": "/run/sshd.pid",
    }
    (shared / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in server.items()), encoding="utf-8")
    client = {
        "IdentityFile": shared / "user_key",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "LogLevel": "ERROR",
    }
    (shared / "ssh_config").write_text("".join(f"{key} {value}\n" for key, value in client.items()), encoding="utf-8")
