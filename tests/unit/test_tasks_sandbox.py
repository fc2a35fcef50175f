"""Code in the jail gets at nothing of ours and is over in time, whatever it tries. Real jails, real attempts."""

import logging
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.tasks import jails
from megatron_rl.tasks import sandbox as sandbox_module
from megatron_rl.tasks.jails import accept_no_jail, find_jail, probe
from megatron_rl.tasks.sandbox import FILE_BYTES, PROCESSES, Sandbox
from megatron_rl.tasks.seccomp import filter_program

SECONDS = 10.0
HASTE = 0.5  # seconds, where the time is to run out
PATIENCE = 60.0  # of a test that waits for an end, on a machine with other work to do
FAULTS = {way: probe(way) for way in ("namespaces", "bwrap")}


@pytest.fixture(params=["namespaces", "bwrap"])
def sandbox(request):
    """One after another, every way of making a jail that this machine has."""
    if FAULTS[request.param]:
        pytest.skip(f"no jail by {request.param}: {FAULTS[request.param]}")
    return Sandbox(request.param, seconds=SECONDS, memory_mb=128, output_bytes=10_000)


@pytest.fixture
def hasty(sandbox):
    return Sandbox(sandbox.way, seconds=HASTE, memory_mb=128)


@pytest.fixture
def refused(sandbox):
    """Asserts that code is refused something by the system: it prints the error that `attempt` raised, and nothing else."""

    def refused(attempt: str, *errors: str) -> None:
        lines = "\n    ".join(attempt.splitlines())
        caught = "except OSError as error:\n    print(type(error).__name__)\nelse:\n    print('in')"
        code = f"import ctypes, os, socket\ntry:\n    {lines}\n{caught}"
        result = sandbox.run(code)
        assert result.ok, result
        assert result.output.strip() in errors, result

    return refused


def jail_processes() -> set[int]:
    """Processes of jails, by their program: runner, guard and launcher all show its command line."""
    found = set()
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if any("code of a model, in a jail" in argument for argument in process.info["cmdline"] or ()):
            found.add(process.pid)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process of a jail, and nothing mounted, outlives its test."""
    before = jail_processes()
    mounts = Path("/proc/self/mountinfo").read_text()
    yield
    deadline = time.monotonic() + PATIENCE
    while (left := jail_processes() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    assert Path("/proc/self/mountinfo").read_text() == mounts


# What it is for ----------------------------------------------------------------------------------------------


def test_code_is_run_and_what_it_writes_comes_back(sandbox):
    result = sandbox.run("import sys\nprint(sum(range(101)))\nprint('Ω', file=sys.stderr)")
    assert (result.output, result.ok, result.reason) == ("5050\nΩ\n", True, "")
    assert 0 < result.seconds < SECONDS


def test_the_standard_library_is_there_and_other_packages_are_not(sandbox):
    names = "decimal fractions hashlib itertools json math random re sqlite3 statistics zlib asyncio"
    result = sandbox.run(f"import {names.replace(' ', ', ')}\nprint(math.factorial(20))")
    assert result.output == "2432902008176640000\n", result
    assert "No module named 'numpy'" in sandbox.run("import numpy").output


def test_an_exception_is_an_error_with_its_traceback(sandbox):
    result = sandbox.run("def f(x):\n    return 1 / x\nf(0)")
    assert (result.ok, result.reason) == (False, "error")
    assert re.fullmatch(
        r'Traceback .*\n  File "code.py", line 3, in <module>\n    f\(0\)\n.*line 2, in f\n.*ZeroDivisionError: .*\n',
        result.output,
        re.DOTALL,
    )


@pytest.mark.parametrize(
    ("code", "ok"), [("import sys; sys.exit(0)", True), ("import sys; sys.exit(4)", False), ("import os; os._exit(1)", False)]
)
def test_the_exit_status_decides(sandbox, code, ok):
    assert sandbox.run(code).ok is ok


@pytest.mark.parametrize("code", ["def f(:\n", "print('\0')", "import os; os.kill(os.getpid(), 11)", "def f(): f()\nf()"])
def test_code_that_cannot_run_or_crashes_is_an_error(sandbox, code):
    result = sandbox.run(code)
    assert (result.ok, result.reason) == (False, "error")


def test_the_same_code_gives_the_same_output(sandbox):
    outputs = {sandbox.run("print({'a', 'b', 'c', 'd', 'e', 'f'}, hash('x'))").output for _ in range(3)}
    assert len(outputs) == 1 and "{" in outputs.pop()


def test_code_longer_than_a_pipe_is_run_whole(sandbox):
    assert sandbox.run(f"x = '{'y' * 300_000}'\nprint(len(x))").output == "300000\n"


def test_nothing_stays_from_one_block_to_the_next(sandbox):
    assert sandbox.run("open('note', 'w').write('x')\nprint(open('note').read())").output == "x\n"
    assert sandbox.run("import os; print(os.listdir('.'), os.getcwd())").output == "[] /work\n"


def test_threads_may_share_a_sandbox(sandbox):
    results = {}

    def work(number: int) -> None:
        results[number] = sandbox.run(f"print({number} ** 2)").output

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == {n: f"{n * n}\n" for n in range(6)}


def test_code_may_have_threads_of_its_own(sandbox):
    code = (
        "import threading\nfor n in range(2):\n    t = threading.Thread(target=print, args=(n,))\n    t.start()\n    t.join()"
    )
    assert sandbox.run(code).output == "0\n1\n"


# The network -------------------------------------------------------------------------------------------------


def test_a_server_on_this_machine_gets_no_connection(refused):
    with socket.create_server(("127.0.0.1", 0)) as server:
        refused(f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)", "PermissionError")
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_an_abstract_socket_of_this_machine_gets_no_connection(refused):
    name = f"test-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen()
        refused(f"socket.socket(socket.AF_UNIX).connect('\\0{name}')", "ConnectionRefusedError")
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG"])
def test_there_are_no_sockets_to_other_machines_or_to_the_host_of_a_virtual_one(refused, family):
    refused(f"socket.socket(socket.{family}, socket.SOCK_DGRAM)", "PermissionError")


def test_names_are_not_resolved(sandbox):
    result = sandbox.run(
        "import socket\ntry:\n    socket.getaddrinfo('example.com', 80)\nexcept OSError as e:\n    print('no')"
    )
    assert result.output == "no\n"


# Files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path):
    """A file that everybody on this machine may read and write."""
    path = tmp_path / "secret"
    path.write_text("the secret")
    for folder in (path, *path.parents):
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(0o777)
    return path


def test_a_file_that_everybody_may_read_cannot_be_read_nor_written(refused, secret):
    refused(f"open({str(secret)!r})", "FileNotFoundError")
    refused(f"open({str(secret)!r}, 'w')", "FileNotFoundError")
    refused(f"os.symlink({str(secret)!r}, 'link'); open('link')", "FileNotFoundError")
    assert secret.read_text() == "the secret"


def test_the_home_folder_and_the_trainers_own_files_are_not_there(sandbox):
    names = [str(Path.home()), str(Path(__file__).parents[2]), "/etc/passwd", "/tmp", "/proc", "/sys", "/home", "/var", "/run"]
    # The home folder may lead to the interpreter, and on the way there is that way alone.
    python = (str(Path(os.__file__).parents[1]), os.path.realpath(sys._base_executable))
    code = f"""
import os
for name in {names!r}:
    found = [name] if os.path.isfile(name) else []
    for folder, folders, files in os.walk(name):
        found += [os.path.join(folder, entry) for entry in files + folders]
    print(*(f for f in found if not any((f + "/").startswith(p + "/") or p.startswith(f + "/") for p in {python!r})))
"""
    result = sandbox.run(code)
    assert result.ok and result.output.split() == [], result


def test_the_root_holds_what_the_interpreter_needs_and_a_folder_to_work_in(sandbox):
    seen = set(sandbox.run("import os; print(*os.listdir('/'))").output.split())
    top = "/" + Path(os.__file__).parts[1]
    assert {"work", "dev"} <= seen <= {"work", "dev", "usr", "lib", "lib32", "lib64", "etc", top[1:]}
    assert sandbox.run("import os; print(*sorted(os.listdir('/dev')))").output == "null random urandom zero\n"


def test_the_root_and_the_interpreter_are_read_only(refused):
    for path in ("/new", "/usr/new", "/dev/new", os.__file__):
        refused(f"open({path!r}, 'a')", "OSError", "PermissionError")
    refused(f"os.remove({os.__file__!r})", "OSError", "PermissionError")
    refused("os.chmod('/', 0o777)", "OSError", "PermissionError")


def test_no_path_leads_out_of_the_root(refused, sandbox, secret):
    assert sandbox.run("import os; os.chdir('../../../..'); print(os.getcwd(), 'work' in os.listdir('.'))").output == "/ True\n"
    refused("os.chroot('/work')", "PermissionError")
    refused(f"os.open({str(secret)[1:]!r}, os.O_RDONLY, dir_fd=os.open('/', os.O_RDONLY))", "FileNotFoundError")


def test_no_descriptor_of_ours_is_open_in_it(sandbox, secret):
    with secret.open() as held:
        os.set_inheritable(held.fileno(), True)
        code = "import os\nfor n in range(3, 4096):\n    try:\n        print(n, os.fstat(n))\n    except OSError:\n        pass"
        assert sandbox.run(code).output == ""
        assert sandbox.run("import os; print(os.fstat(0).st_rdev - os.stat('/dev/null').st_rdev)").output == "0\n"


def test_devices_cannot_be_made_or_mounted(refused):
    refused("os.mknod('disk', 0o60666, os.makedev(254, 0))", "PermissionError")
    refused("os.mknod('mem', 0o20666, os.makedev(1, 1))", "PermissionError")
    refused("open('/dev/mem', 'rb')", "FileNotFoundError")
    libc = "libc = ctypes.CDLL(None, use_errno=True)\nif libc.{} < 0: raise OSError(ctypes.get_errno(), '')"
    for call in (
        "mount(b'none', b'/work', b'tmpfs', 0, None)",
        "umount2(b'/work', 2)",
        "unshare(0x10000000)",
        "unshare(0x20000)",
    ):
        refused(libc.format(call), "PermissionError")


# The trainer -------------------------------------------------------------------------------------------------


def test_nothing_of_the_environment_is_known_in_it(sandbox, monkeypatch):
    monkeypatch.setenv("TEST_SECRET", "token-1234")
    code = "import ctypes, os, socket\nprint(dict(os.environ), ctypes.CDLL(None).getenv(b'TEST_SECRET'), socket.gethostname())"
    assert sandbox.run(code).output == "{} 0 jail\n"


def test_the_trainer_is_not_visible_and_gets_no_signal(refused):
    refused(f"os.kill({os.getpid()}, 0)", "ProcessLookupError")
    refused(f"open('/proc/{os.getpid()}/environ')", "FileNotFoundError")
    refused("os.kill(os.getppid(), 9); raise OSError", "OSError")  # its guard shrugs it off
    refused(
        f"libc = ctypes.CDLL(None, use_errno=True)\nif libc.ptrace(16, {os.getpid()}, 0, 0): raise PermissionError",
        "PermissionError",
    )
    refused("libc = ctypes.CDLL(None)\nif libc.ptrace(16, 1, 0, 0): raise PermissionError", "PermissionError")
    refused("import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))", "PermissionError")


def test_it_has_no_rights_and_cannot_get_any(refused, sandbox):
    assert sandbox.run("import os; print(*os.getresuid(), *os.getresgid())").output == "1000 1000 1000 1000 1000 1000\n"
    refused("os.setuid(0)", "PermissionError", "OSError")
    refused("os.setgroups([0])", "PermissionError")
    code = (
        "import resource\ntry:\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nexcept ValueError as e:\n    print('no')"
    )
    assert sandbox.run(code).output == "no\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has more rights to lose than the user it is")
def test_code_does_not_run_as_root_outside_either():
    if FAULTS["namespaces"]:
        pytest.skip(f"no jail: {FAULTS['namespaces']}")
    sandbox = Sandbox("namespaces", seconds=SECONDS, memory_mb=64)
    thread = threading.Thread(target=sandbox.run, args=("import time; time.sleep(1)",))
    before, users = jail_processes(), set()
    thread.start()
    while thread.is_alive():
        for pid in jail_processes() - before:
            try:
                users.add(psutil.Process(pid).uids().real)
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.02)
    assert users == {0, 65534}


# Limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import signal, time\n[signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15, 24)]\nwhile True: time.sleep(1)",
        "import os, time\nos.closerange(0, 64)\ntime.sleep(1000)",
        "import os, signal, time\nwhile True: os.kill(os.getppid(), signal.SIGCHLD); time.sleep(0.01)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "import threading\n[threading.Thread(target=lambda: any(iter(int, 1))).start() for _ in range(4)]",
        "10 ** 10 ** 10",
        "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
    ],
    ids=["loop", "sleep", "deaf", "closed", "false alarm", "stopped", "threads", "number", "regex"],
)
def test_code_that_does_not_end_is_ended_in_time(hasty, code):
    started = time.monotonic()
    result = hasty.run(code)
    assert (result.ok, result.reason) == (False, "timeout")
    assert HASTE * 0.9 < result.seconds < HASTE + 3
    assert time.monotonic() - started < PATIENCE


def test_memory_is_bounded(sandbox):
    for code in ("x = bytearray(10 ** 9)", "x = []\nwhile True: x.append('y' * 100_000)"):
        result = sandbox.run(code)
        assert (result.ok, result.reason) == (False, "memory"), result
    assert sandbox.run("x = bytearray(100 * 2 ** 20); print(len(x))").ok


@pytest.mark.parametrize(
    "call", ["os.memfd_create('x')", "m = ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600)\nif m < 0: raise PermissionError"]
)
def test_memory_that_no_limit_counts_is_not_to_be_had(refused, call):
    refused(call, "PermissionError")


def test_output_is_cut_while_it_is_read_and_ends_the_code(sandbox):
    before = psutil.Process().memory_info().rss
    result = sandbox.run("while True: print('x' * 10_000_000)")
    assert (result.ok, result.reason, len(result.output)) == (False, "output", 10_000)
    assert result.seconds < SECONDS
    assert psutil.Process().memory_info().rss - before < 100 << 20


def test_output_at_the_bound_is_whole(sandbox):
    result = sandbox.run("print('x' * 9_999)")
    assert (result.ok, len(result.output)) == (True, 10_000)


def test_files_are_bounded_one_by_one_and_together(sandbox):
    code = f"""
def fill(name, size):
    try:
        with open(name, "wb") as f:
            for _ in range(size // 1_000_000):
                f.write(bytes(1_000_000))
    except OSError as error:
        print(error.strerror)
fill("one", {2 * FILE_BYTES})
import os
os.remove("one")
for number in range(4):
    fill(str(number), {FILE_BYTES} * 3 // 4)
"""
    lines = sandbox.run(code).output.splitlines()
    assert lines[0] in ("File too large", "No space left on device")
    assert set(lines[1:]) == {"No space left on device"}


def test_a_fork_bomb_makes_no_process(sandbox):
    started = time.monotonic()
    result = sandbox.run("import os\nwhile True:\n    os.fork()")
    assert (result.ok, result.reason) == (False, "error") and "PermissionError" in result.output
    clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    calls = f"libc.fork(), libc.vfork(), libc.syscall({clone}, 17, 0, 0, 0, 0), libc.syscall(435, 0, 0)"
    code = f"import ctypes\nlibc = ctypes.CDLL(None)\nprint({calls})"
    assert sandbox.run(code).output == "-1 -1 -1 -1\n"
    assert time.monotonic() - started < PATIENCE


def test_a_thread_bomb_is_bounded(sandbox):
    code = """
import threading, time
threading.stack_size(65536)
count = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        count += 1
except RuntimeError:
    print(count)
"""
    result = sandbox.run(code)
    assert result.ok, result
    assert int(result.output) < (PROCESSES if sandbox.way == "namespaces" or os.geteuid() else 5000)


def test_no_daemon_survives_and_no_other_program_is_started(sandbox, refused):
    refused("os.execv('/proc/self/exe', ['x'])", "PermissionError")
    refused("import subprocess; subprocess.run(['true'])", "PermissionError")
    daemon = "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time; time.sleep(600)"
    assert "PermissionError" in sandbox.run(daemon).output


def test_an_end_of_the_trainer_is_the_end_of_its_jails(tmp_path):
    if FAULTS["namespaces"]:
        pytest.skip(f"no jail: {FAULTS['namespaces']}")
    before = jail_processes()
    program = (
        "from megatron_rl.tasks.sandbox import Sandbox; Sandbox('namespaces', seconds=60, memory_mb=64).run('while True: pass')"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    deadline = time.monotonic() + PATIENCE * 2
    while len(jail_processes() - before) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(jail_processes() - before) >= 3, "launcher, guard and runner"
    trainer.kill()
    trainer.wait()
    while (left := jail_processes() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def guard_of_a_runner() -> psutil.Process | None:
    """Of our only jail: its middle process, once the code runs and has a second thread."""
    for launcher in psutil.Process().children():
        try:
            for guard in launcher.children():
                if any(runner.num_threads() > 1 for runner in guard.children()):
                    return guard
        except psutil.NoSuchProcess:
            continue
    return None


@pytest.mark.parametrize(("end", "seconds", "reason"), [(signal.SIGKILL, 300, "error"), (signal.SIGSTOP, 3, "timeout")])
def test_a_jail_that_fails_under_its_code_is_a_failure_of_the_code_and_not_of_the_run(
    sandbox, monkeypatch, end, seconds, reason
):
    monkeypatch.setattr(sandbox_module, "_START_S", 4.0)
    sandbox.seconds = seconds
    code = "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)"
    found = []
    thread = threading.Thread(target=lambda: found.append(sandbox.run(code)))
    thread.start()
    deadline, guard = time.monotonic() + PATIENCE, None
    while guard is None and time.monotonic() < deadline:
        guard = guard_of_a_runner()
    assert guard is not None
    guard.send_signal(end)
    thread.join(PATIENCE)
    assert [(result.ok, result.reason) for result in found] == [(False, reason)]


# Without a jail ----------------------------------------------------------------------------------------------


def test_the_probe_tells_what_code_reaches_where_there_is_no_jail():
    assert "files of this machine" in probe("unsafe") and "the trainer" in probe("unsafe")


def test_no_jail_is_an_error_that_says_why_and_what_to_do(monkeypatch):
    monkeypatch.setattr(jails, "probe", lambda way: f"{way} is broken")
    find_jail.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"bwrap: bwrap is broken.*install bubblewrap.*task\.sandbox=unsafe"):
            find_jail()
    finally:
        find_jail.cache_clear()


@pytest.mark.skipif(not shutil.which("unshare"), reason="no `unshare` to make a machine without namespaces with")
def test_where_namespaces_are_forbidden_the_jail_is_refused_with_the_reason():
    program = "from megatron_rl.tasks.jails import find_jail; find_jail()"
    forbid = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c '{program}'"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "find_jail" not in answer.stderr:
        pytest.skip(f"this machine cannot be made into one without namespaces: {answer.stderr}")
    assert "namespaces: the sandbox failed (namespaces): unshare (new namespaces): " in answer.stderr
    assert "task.sandbox=unsafe" in answer.stderr


def test_a_machine_whose_calls_are_not_listed_has_no_filter_and_no_jail(monkeypatch):
    assert filter_program("sparc") is None
    assert len(filter_program("aarch64") or b"") % 8 == 0
    monkeypatch.setattr(jails, "filter_program", lambda: None)
    assert "no filter of system calls" in probe("namespaces")


def test_unsafe_is_warned_of_once_and_keeps_the_limits(caplog):
    accept_no_jail.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert accept_no_jail() == accept_no_jail() == "unsafe"
    assert [r.getMessage() for r in caplog.records] == [caplog.records[0].getMessage()] and "your rights" in caplog.text
    sandbox = Sandbox("unsafe", seconds=SECONDS, memory_mb=128, output_bytes=1000)
    seen = sandbox.run("import os; open('x', 'w'); print(os.listdir('.'), os.getcwd(), dict(os.environ))").output.split()
    assert seen[0] == "['x']" and seen[2] == "{}" and not os.path.exists(seen[1])
    reasons = {
        "import time; time.sleep(1000)": "timeout",
        "x = bytearray(10 ** 9)": "memory",
        "while True: print('x' * 1000)": "output",
        "1 / 0": "error",
    }
    assert {code: sandbox.run(code).reason for code in reasons} == reasons


@pytest.mark.skipif(os.geteuid() != 0, reason="this user is not root, and all tests here are of its own jail")
def test_a_user_without_rights_has_a_jail_too(tmp_path):
    python = "/usr/bin/python3"
    new = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if FAULTS["namespaces"] or not shutil.which(python) or subprocess.run(new, check=False).returncode:
        pytest.skip(f"no jail, or no {python} of version 3.11 that everybody may use")
    # The modules that make the jail need nothing that is not here; the rest of the package may not be readable.
    for name in (
        "errors.py",
        "tasks/jails.py",
        "tasks/sandbox.py",
        "tasks/jail.py",
        "tasks/seccomp.py",
        "tasks/interpreter.py",
    ):
        copy = tmp_path / "megatron_rl" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(jails.__file__).parents[1] / name, copy)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(0o755)
    program = """
from megatron_rl.tasks.jails import probe
from megatron_rl.tasks.sandbox import Sandbox
print([probe("namespaces")], Sandbox("namespaces", seconds=5, memory_mb=64).run("print(6 * 7)").output)
"""
    answer = subprocess.run(
        [python, "-c", program],
        cwd=tmp_path,
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout == "[''] 42\n\n", answer.stderr
