"""Running something on a host of a lab: a script that enters the host, and one that mpirun calls in ssh's place."""

from __future__ import annotations

from sparsecomm.tools.lab.state import State

__all__ = ["agent", "on_host", "write_scripts"]

# A host name and /etc/hosts of its own, and a /sys that shows its interfaces: UCX and sparsecomm's doctor look there.
_ENTER = """\
#!/bin/sh
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
#!/bin/sh
# agent [OPTION]... HOST WORD...: what mpirun calls to start its daemon on another host; options are ssh's
while case $1 in -*) ;; *) false ;; esac; do shift; done
host=$1
shift
exec /bin/sh "$(dirname "$0")/enter" "$host" /bin/sh -c "$*"
"""


def write_scripts(state: State) -> None:
    """Writes the scripts and the hosts file into the lab's folder."""
    (state.folder / "enter").write_text(_ENTER)
    (state.folder / "agent").write_text(_AGENT)
    (state.folder / "agent").chmod(0o755)
    known = [("127.0.0.1", "localhost"), *zip(state.addresses, state.hosts, strict=True)]
    lines = [f"{address}\t{host}" for address, host in known]
    # torch asks for the names of IPv4-mapped addresses, and warns if there are none; no host is looked up by these.
    lines += [f"::ffff:{address}\t{host}.mapped" for address, host in known]
    (state.folder / "hosts").write_text("\n".join(lines) + "\n")


def on_host(state: State, host: str, command: list[str]) -> list[str]:
    """Returns the command that becomes `command` on a host."""
    return ["/bin/sh", str(state.folder / "enter"), host, *command]


def agent(state: State) -> str:
    """Returns the launch agent as one line. It is run by a shell since /run is often mounted noexec."""
    return f"/bin/sh {state.folder / 'agent'}"
