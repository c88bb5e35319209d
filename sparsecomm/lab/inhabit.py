"""Running something on a host of a lab: a script that enters the host, and one that mpirun calls in ssh's place."""

from __future__ import annotations

from sparsecomm.lab.state import State

__all__ = ["agent", "on_host", "write_scripts"]

# A host name and /etc/hosts of its own, and a /sys that shows its interfaces: UCX and sparsecomm's doctor look there.
_ENTER = """\
# enter HOST COMMAND [ARGUMENT...]: becomes the command, on a host of this lab
set -e
here=$(dirname "$0")
host=$1
shift
exec nsenter --net="$here/ns/$host" unshare --uts --mount --propagation slave /bin/sh -ec '
  echo "$1" > /proc/sys/kernel/hostname
  mount --bind "$2" /etc/hosts
  mount -t sysfs sysfs /sys
  shift 2
  exec "$@"' enter "$host" "$here/hosts" "$@"
"""
# As ssh does, it joins the words and leaves them to a shell.
_AGENT = """\
# agent HOST WORD...: what mpirun calls to start its daemon on another host
host=$1
shift
exec /bin/sh "$(dirname "$0")/enter" "$host" /bin/sh -c "$*"
"""


def write_scripts(state: State) -> None:
    """Writes the scripts and the hosts file into the lab's folder."""
    (state.folder / "enter").write_text(_ENTER)
    (state.folder / "agent").write_text(_AGENT)
    lines = [f"{address}\t{host}" for address, host in zip(state.addresses, state.hosts, strict=True)]
    (state.folder / "hosts").write_text("\n".join(["127.0.0.1\tlocalhost", *lines]) + "\n")


def on_host(state: State, host: str, command: list[str]) -> list[str]:
    """Returns the command that becomes `command` on a host."""
    return ["/bin/sh", str(state.folder / "enter"), host, *command]


def agent(state: State) -> str:
    """Returns the launch agent as one line. It is run by a shell since /run is often mounted noexec."""
    return f"/bin/sh {state.folder / 'agent'}"
