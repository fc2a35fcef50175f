"""Code in the jail cannot reach anything outside it. The jails and the attempts are real."""

import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from megatron_rl.sandbox.runner import Sandbox
from tests.unit.sandbox.conftest import FAULTS, SECONDS, jail_processes

# The network ------------------------------------------------------------------------------------------------


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


# Files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path):
    """The file may be read and written by every user of this machine."""
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
    names = [
        str(Path.home()),
        str(Path(__file__).parents[3]),
        "/etc/passwd",
        "/tmp",
        "/proc",
        "/sys",
        "/home",
        "/var",
        "/run",
    ]
    # The home folder may be on the path to the interpreter. Then the jail has only the folders of that path.
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
    assert (
        sandbox.run("import os; os.chdir('../../../..'); print(os.getcwd(), 'work' in os.listdir('.'))").output
        == "/ True\n"
    )
    refused("os.chroot('/work')", "PermissionError")
    refused(f"os.open({str(secret)[1:]!r}, os.O_RDONLY, dir_fd=os.open('/', os.O_RDONLY))", "FileNotFoundError")


def test_no_descriptor_of_ours_is_open_in_it(sandbox, secret):
    with secret.open() as held:
        os.set_inheritable(held.fileno(), True)
        code = (
            "import os\nfor n in range(3, 4096):\n"
            "    try:\n        print(n, os.fstat(n))\n    except OSError:\n        pass"
        )
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


# The trainer ------------------------------------------------------------------------------------------------


def test_nothing_of_the_environment_is_known_in_it(sandbox, monkeypatch):
    monkeypatch.setenv("TEST_SECRET", "token-1234")
    code = (
        "import ctypes, os, socket\n"
        "print(dict(os.environ), ctypes.CDLL(None).getenv(b'TEST_SECRET'), socket.gethostname())"
    )
    assert sandbox.run(code).output == "{} 0 jail\n"


def test_the_trainer_is_not_visible_and_gets_no_signal(refused):
    refused(f"os.kill({os.getpid()}, 0)", "ProcessLookupError")
    refused(f"open('/proc/{os.getpid()}/environ')", "FileNotFoundError")
    refused("os.kill(os.getppid(), 9); raise OSError", "OSError")  # The signal has no effect on the guard.
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
        "import resource\ntry:\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
        "except ValueError as e:\n    print('no')"
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
