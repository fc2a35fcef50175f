"""Program that runs one block of code in a jail. `runner.py` sends it to a new interpreter, which calls `main`.

A jail has three processes, and each is the child of the one before:

- The launcher makes new namespaces.
- The guard is the first process of the new process namespace. It builds its own root and gives up every privilege. Then
  it watches the clock and the trainer's pipe. When the guard ends, every process of the jail ends.
- The runner sets its limits and runs the code.

Where bubblewrap is used, it takes the launcher's place, builds the root and drops the privileges.

Standard input stays open. When the trainer closes it or ends, the jail ends. The code writes to standard output.
The guard reports on a descriptor that the code does not have: when it begins, and how it ended. Imports here cost time
for every block of code, so there are few.
"""

from __future__ import annotations

# The module `signal` around this one takes longer to import than all other imports together.
import _signal as signal  # type: ignore[import-not-found]
import ctypes
import io
import os
import resource
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Request = dict[str, Any]

INSIDE = 1000  # user and group of the code inside the jail
OUTSIDE = 65534  # the same user and group on the host, if the trainer is root: nobody

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 1024, 2048, 4096, 16384, 1 << 18, 1 << 21
KEPT = {"nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC, "noatime": MS_NOATIME, "nodiratime": MS_NODIRATIME}
KEPT["relatime"] = MS_RELATIME
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CLOSE_RANGE = 436
CAPABILITY_VERSION = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, result: int) -> int:
    """Return `result` of a system call. Raises OSError with `what` in its message if the call failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount a file system, as mount(2).

    Args:
        source: device, file or folder; None where the kind has none.
        target: folder or file where it is mounted.
        kind: kind of file system; None where the flags decide.
        flags: flags of mount(2).
        options: options of the file system.
    """
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    call(f"mount {target}", libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()))


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root and move the old root to `old`, as pivot_root(2)."""
    number = PIVOT_ROOT[os.uname().machine]
    call(f"pivot_root {new}", libc.syscall(ctypes.c_long(number), new.encode(), old.encode()))


def prctl(what: int, *arguments: int) -> None:
    """Call prctl(2)."""
    call(f"prctl {what}", libc.prctl(what, *(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4])))


# The launcher: namespaces ------------------------------------------------------------------------------------


def launch(request: Request, report: int) -> None:
    """Make new namespaces and become the launcher. Return only in the guard."""
    identity = os.geteuid(), os.getegid()
    mapper = map_from_outside() if identity[0] == 0 and knows(OUTSIDE) else None
    everything = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    call("unshare (new namespaces)", libc.unshare(everything))
    if mapper is not None:
        mapper()
    else:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{INSIDE} {identity[0]} 1")
        write("/proc/self/gid_map", f"{INSIDE} {identity[1]} 1")
    guard = os.fork()
    if guard == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        build_root(request)
        give_up_privileges(mapper is not None)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # A change of user clears the first one.
        return
    os.closerange(0, report + 1)
    os.waitpid(guard, 0)
    os._exit(0)


def knows(user: int) -> bool:
    """Return True if the user namespace that this process started in has this user."""
    with open("/proc/self/uid_map") as lines:
        extents = [[int(word) for word in line.split()] for line in lines]
    return any(first <= user < first + count for first, _, count in extents)


def map_from_outside() -> Callable[[], None]:
    """Fork a process that stays in the old user namespace and later writes the user and group maps of the new one.

    In the old namespace, root may give the new one a second user, which has no privileges. The code must not be root,
    because root's own limits do not bind it. Call the returned function in the new namespace. It lets the process
    write the maps, and raises OSError if they could not be written.
    """
    asked, ask = os.pipe()
    done, tell = os.pipe()
    launcher = os.getpid()
    if os.fork() == 0:
        try:
            os.close(ask)
            # An empty read means that the launcher has failed.
            for name in ("uid_map", "gid_map") if os.read(asked, 1) else ():
                write(f"/proc/{launcher}/{name}", f"0 0 1\n{INSIDE} {OUTSIDE} 1")
            os.write(tell, b"1")
        finally:
            os._exit(0)
    os.close(tell)

    def finish() -> None:
        os.write(ask, b"1")
        written = os.read(done, 1)
        os.wait()
        for descriptor in (asked, ask, done):
            os.close(descriptor)
        if not written:
            raise OSError("the maps of the user namespace could not be written")

    return finish


def write(path: str, text: str) -> None:
    """Write a text to an existing file. An error names the file."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise OSError(error.errno, f"write {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


# The guard: a root, no privileges ----------------------------------------------------------------------------


def build_root(request: Request) -> None:
    """Build a root in memory that holds what the request names, read-only, and one small folder to write in."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    mount("tmpfs", "/new", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for source, target in request["binds"]:
        bind(f"/old{source}", f"/new{target}")
    for target in request["hidden"]:
        mount("tmpfs", f"/new{target}", "tmpfs", MS_NOSUID | MS_NODEV, "size=4k,mode=755")
    for target, text in request["links"]:
        os.makedirs(os.path.dirname(f"/new{target}"), exist_ok=True)
        os.symlink(text, f"/new{target}")
    os.makedirs(f"/new{request['folder']}")
    with open("/old/proc/self/mountinfo") as lines:
        mounts = [
            (fields[4], fields[5].split(",")) for fields in map(str.split, lines) if f"{fields[4]}/".startswith("/new/")
        ]
    for target, options in mounts:
        flags = sum(flag for name, flag in KEPT.items() if name in options) | MS_NOSUID
        flags |= 0 if target.startswith("/new/dev/") else MS_NODEV
        mount(None, unescaped(target), None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
    size = f"size={request['file_bytes']},nr_inodes=1024,mode=700,uid={INSIDE},gid={INSIDE}"
    mount("tmpfs", f"/new{request['folder']}", "tmpfs", MS_NOSUID | MS_NODEV, size)
    os.chdir("/new")
    pivot_root(".", ".")
    call("umount of the old root", libc.umount2(b".", MNT_DETACH))
    call("sethostname", libc.sethostname(b"jail", 4))


def bind(source: str, target: str) -> None:
    """Bind-mount `source` at `target`, which is created."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, None, MS_BIND | MS_REC)


def unescaped(path: str) -> str:
    """Return a path of mountinfo without its escapes: white space and backslashes are octal there."""
    for code in ("040", "011", "012", "134"):
        path = path.replace(f"\\{code}", chr(int(code, 8)))
    return path


def give_up_privileges(become_user: bool) -> None:
    """Drop every capability, and the user's and groups' ids if `become_user`."""
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break
    if become_user:
        os.setgroups([])
        os.setresgid(INSIDE, INSIDE, INSIDE)
        os.setresuid(INSIDE, INSIDE, INSIDE)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    call("capset", libc.capset(header, (ctypes.c_uint32 * 6)()))


def guard(request: Request, report: int) -> None:
    """Fork the runner and return in it. The guard waits for the end of the runner, the time or the trainer.

    Then it ends the runner, reports and exits.
    """
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    os.write(report, b"begun\n")
    started = time.monotonic()
    runner = os.fork()
    if runner == 0:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        return
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    poll.register(0, select.POLLHUP)
    gone = left = 0
    while not gone and (left := started + request["seconds"] - time.monotonic()) > 0:
        if (0, select.POLLHUP) in poll.poll(left * 1000):
            break
        drain(woken)
        # The code may send SIGCHLD while the runner still runs.
        gone, status, used = os.wait4(runner, os.WNOHANG)
    seconds = time.monotonic() - started
    end_group(runner)
    if not gone:
        _, status, used = os.wait4(runner, 0)
    late = not gone or (os.WIFSIGNALED(status) and used.ru_utime + used.ru_stime >= request["seconds"])
    os.write(report, f"ended {int(late)} {os.waitstatus_to_exitcode(status)} {seconds}\n".encode())
    os._exit(0)


def drain(descriptor: int) -> None:
    """Read what waits in a non-blocking pipe, at most 4096 bytes."""
    try:
        os.read(descriptor, 4096)
    except BlockingIOError:
        return


def end_group(runner: int) -> None:
    """Kill the process group of the runner, and the runner."""
    for end in (os.killpg, os.kill):
        try:
            end(runner, signal.SIGKILL)
        except ProcessLookupError:
            continue


# The runner --------------------------------------------------------------------------------------------------


def limit(request: Request) -> None:
    """Set the limits and the filter of system calls. Neither can be undone."""
    os.setpgid(0, 0)
    os.chdir(request["folder"])
    cpu = int(request["seconds"]) + 1
    limits = {"CPU": cpu, "AS": request["memory_bytes"], "FSIZE": request["file_bytes"], "NOFILE": 64}
    limits |= {"CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
    if request["processes"]:
        limits["NPROC"] = request["processes"]
    for name, most in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(number, (most, most))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if request["filter"]:
        program = bytes.fromhex(request["filter"])
        buffer = ctypes.create_string_buffer(program, len(program))
        pointed = ctypes.create_string_buffer(
            (len(program) // 8).to_bytes(8, sys.byteorder) + ctypes.addressof(buffer).to_bytes(8, sys.byteorder)
        )
        prctl(PR_SET_SECCOMP, 2, ctypes.addressof(pointed))
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(1, 2)
    # Linux before 5.9 has no close_range.
    if libc.syscall(ctypes.c_long(CLOSE_RANGE), 3, ctypes.c_uint(0xFFFFFFFF), 0) < 0:
        os.closerange(3, 1 << 16)
    os.environ.clear()


def run(code: str, memory_exit: int) -> int:
    """Run the code and return its exit status. Tracebacks go to the code's output.

    After a MemoryError, exit with `memory_exit`.
    """
    sys.argv = ["code.py"]
    assert isinstance(sys.stdout, io.TextIOWrapper)
    # Line buffering keeps the order with standard error, and keeps the output of code that runs out of time.
    sys.stdout.reconfigure(line_buffering=True)
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    try:
        exec(compile(code, "code.py", "exec"), main.__dict__)
    except MemoryError:
        write_output("MemoryError\n")
        os._exit(memory_exit)
    except Exception as error:  # noqa: BLE001  The code may raise anything.
        tell(error, code)
        return 1
    return 0


def write_output(text: str) -> None:
    """Write a text to standard output."""
    try:
        sys.stdout.flush()
        os.write(1, text.encode(errors="replace"))
    except (OSError, MemoryError, ValueError, AttributeError):
        return


def tell(error: Exception, code: str) -> None:
    """Write the traceback of an error in the model's code."""
    import linecache  # imported here, because most code does not need it
    import traceback

    linecache.cache["code.py"] = (len(code), None, code.splitlines(True), "code.py")
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    write_output("".join(traceback.format_exception(type(error), error, trace)))


def main(request: Request, report: int) -> None:
    """Run one block of code in a jail, and report its end through the file descriptor `report`."""
    try:
        if request["way"] == "namespaces":
            launch(request, report)
        guard(request, report)
        limit(request)
    except OSError as error:
        os.write(report, f"broken {error.strerror or error}\n".encode())
        os._exit(1)
    sys.exit(run(request["code"], request["memory_exit"]))
