"""Runs commands on a host of a lab: a script that enters the host, and a script that replaces ssh for mpirun."""

from __future__ import annotations

from sparsecomm.tools.lab.state import State

__all__ = ["agent", "on_host", "write_scripts"]

# A pinned host has a file with its core; everything that is started on the host inherits the affinity.
# Each host has a separate host name and /etc/hosts, and a /sys with its interfaces, which UCX and doctor read.
_ENTER = """\
#!/bin/sh
# enter HOST COMMAND [ARGUMENT...]: replaces itself with the command, on a host of this lab
set -e
here=$(dirname "$0")
host=$1
shift
pin=
[ ! -f "$here/cores/$host" ] || pin="taskset --cpu-list $(cat "$here/cores/$host")"
exec $pin nsenter --net="$here/ns/$host" unshare --uts --mount --propagation slave /bin/sh -ec '
  echo "$1" > /proc/sys/kernel/hostname
  mount --bind "$2" /etc/hosts
  mount -t sysfs sysfs /sys
  shift 2
  exec "$@"' enter "$host" "$here/hosts" "$@"
"""
# Like ssh, the agent joins the words and passes them to a shell.
_AGENT = """\
#!/bin/sh
# agent [OPTION]... HOST WORD...: mpirun calls this to start its daemon on another host; it skips ssh's options
while case $1 in -*) ;; *) false ;; esac; do shift; done
host=$1
shift
exec /bin/sh "$(dirname "$0")/enter" "$host" /bin/sh -c "$*"
"""


def write_scripts(state: State) -> None:
    """Writes the scripts, the hosts file and the core of each pinned host into the lab's folder."""
    if state.cores is not None:
        (state.folder / "cores").mkdir()
        for host, core in zip(state.hosts, state.cores, strict=True):
            (state.folder / "cores" / host).write_text(f"{core}\n")
    (state.folder / "enter").write_text(_ENTER)
    (state.folder / "agent").write_text(_AGENT)
    (state.folder / "agent").chmod(0o755)
    known = [("127.0.0.1", "localhost"), *zip(state.addresses, state.hosts, strict=True)]
    lines = [f"{address}\t{host}" for address, host in known]
    # torch looks up names of IPv4-mapped addresses and warns if there are none; nobody looks up these names.
    lines += [f"::ffff:{address}\t{host}.mapped" for address, host in known]
    (state.folder / "hosts").write_text("\n".join(lines) + "\n")


def on_host(state: State, host: str, command: list[str]) -> list[str]:
    """Returns the command that runs `command` on a host."""
    return ["/bin/sh", str(state.folder / "enter"), host, *command]


def agent(state: State) -> str:
    """Returns the launch agent as one command line. A shell runs it because /run is often mounted noexec."""
    return f"/bin/sh {state.folder / 'agent'}"
