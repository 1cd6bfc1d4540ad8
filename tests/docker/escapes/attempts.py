"""What a hostile task might try: each attempt is a function, which raises, or returns its loot; ``None`` is none.

They are grouped by what they are after; the groups are those of ``docs/explanation/threat-model.md``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import resource
import signal
import socket
import struct
import subprocess
import urllib.request
from collections.abc import Callable
from typing import Any

Facts = dict[str, Any]
Attempt = Callable[[Facts], object]

ATTEMPTS: dict[str, Attempt] = {}

_libc = ctypes.CDLL(None, use_errno=True)
_WRITE = os.O_WRONLY | os.O_CLOEXEC


def attempt(function: Attempt) -> Attempt:
    """Add an attempt to the list, by its name."""
    ATTEMPTS[function.__name__] = function
    return function


def make(facts: Facts) -> dict[str, str]:
    """Make every attempt; what came of each: ``refused …`` with the error, ``nothing``, or ``GOT …``."""
    results = {}
    for name, function in ATTEMPTS.items():
        try:
            loot = function(facts)
        except OSError as error:
            results[name] = f"refused {error!r}"
        else:
            results[name] = "nothing" if loot is None else f"GOT {loot!r}"[:300]
    return results


def _call(function: Any, *arguments: Any) -> str:
    if function(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "done"


def _syscall(number: int, *arguments: Any) -> str:
    return _call(_libc.syscall, number, *arguments)


def _read(path: str) -> str | None:
    return pathlib.Path(path).read_text(errors="replace")[:200] or None


def _open(path: str, flags: int = _WRITE) -> str:
    os.close(os.open(path, flags))
    return f"opened {path}"


def _any(paths: list[str], look: Callable[[str], object]) -> object:
    """What any of some paths yields; when none does, the error of the last."""
    found, failure = [], None
    for path in paths:
        try:
            found.append((path, look(path)))
        except OSError as error:
            failure = error
    if failure is not None and not found:
        raise failure
    return found or None


# The kernel's namespaces and file systems


@attempt
def mount_a_file_system(_: Facts) -> object:
    return _call(_libc.mount, b"none", b"/tmp", b"tmpfs", 0, None)


@attempt
def unmount_a_mask_of_proc(_: Facts) -> object:
    return _call(_libc.umount2, b"/proc/acpi", 2)


@attempt
def make_a_user_namespace(_: Facts) -> object:
    return _call(_libc.unshare, 0x10000000)


@attempt
def make_a_mount_namespace(_: Facts) -> object:
    return _call(_libc.unshare, 0x00020000)


@attempt
def clone_into_a_user_namespace(_: Facts) -> object:
    done = subprocess.run(["unshare", "--user", "--map-root-user", "id"], capture_output=True, check=False, text=True)
    if done.returncode:
        raise PermissionError(done.stderr)
    return done.stdout


@attempt
def enter_a_namespace_of_the_supervisor(_: Facts) -> object:
    return _call(_libc.setns, os.open("/proc/1/ns/mnt", os.O_RDONLY), 0)


@attempt
def leave_by_chroot(_: Facts) -> object:
    os.chroot("/tmp")
    return "chroot"


@attempt
def open_a_file_by_its_handle(_: Facts) -> object:
    return _syscall(304, os.open("/tmp", os.O_RDONLY), ctypes.create_string_buffer(64), 0)  # open_by_handle_at


@attempt
def leave_through_the_working_folder_of_an_engine(_: Facts) -> object:
    return _any([f"/proc/self/fd/{number}/etc/hostname" for number in range(3, 20)], _read)


@attempt
def overwrite_the_engines_runtime(_: Facts) -> object:
    return _open("/proc/1/exe", os.O_RDWR)


# Devices and knobs of the kernel


@attempt
def make_a_device_of_the_hosts_disk(_: Facts) -> object:
    os.mknod("/tmp/disk", 0o60666, os.makedev(254, 0))
    return "made"


@attempt
def open_devices_of_the_host(_: Facts) -> object:
    return _any(
        ["/dev/mem", "/dev/kmsg", "/dev/kvm", "/dev/fuse", "/dev/net/tun", "/dev/vda", "/dev/sda", "/dev/port"],
        lambda path: _open(path, os.O_RDONLY),
    )


@attempt
def set_where_core_dumps_go(_: Facts) -> object:
    return _open("/proc/sys/kernel/core_pattern")


@attempt
def set_the_loader_of_modules(_: Facts) -> object:
    return _open("/proc/sys/kernel/modprobe")


@attempt
def press_the_magic_key(_: Facts) -> object:
    return _open("/proc/sysrq-trigger")


@attempt
def have_the_cgroup_run_something(_: Facts) -> object:
    paths = [str(path) for path in pathlib.Path("/sys/fs/cgroup").rglob("*release_agent")]
    return _any([*paths, "/sys/fs/cgroup/release_agent", "/sys/fs/cgroup/memory/release_agent"], _open)


@attempt
def raise_the_limit_of_memory(_: Facts) -> object:
    return _any(["/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max"], _open)


@attempt
def raise_the_limit_of_open_files(_: Facts) -> object:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard + 1))
    except ValueError as error:
        raise PermissionError(str(error)) from error
    return "raised"


@attempt
def load_a_module(_: Facts) -> object:
    return _syscall(175, b"", 0, b"")  # init_module


@attempt
def load_a_program_into_the_kernel(_: Facts) -> object:
    return _syscall(321, 0, ctypes.create_string_buffer(128), 128)  # bpf


@attempt
def watch_the_processor(_: Facts) -> object:
    return _syscall(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)  # perf_event_open


@attempt
def catch_page_faults(_: Facts) -> object:
    return _syscall(323, 0)  # userfaultfd


@attempt
def use_the_kernels_keys(_: Facts) -> object:
    return _syscall(250, 0, -3, 1)  # keyctl


@attempt
def make_an_io_uring(_: Facts) -> object:
    return _syscall(425, 1, ctypes.create_string_buffer(120))


@attempt
def read_the_kernels_log(_: Facts) -> object:
    return _call(_libc.klogctl, 3, None, 0)


@attempt
def find_the_kernel_in_memory(_: Facts) -> object:
    lines = pathlib.Path("/proc/kallsyms").read_text().splitlines()
    return [line for line in lines[:50] if not line.startswith("0000000000000000")] or None


@attempt
def set_the_clock(_: Facts) -> object:
    return _call(_libc.clock_settime, 0, (ctypes.c_long * 2)(0, 0))


@attempt
def rename_the_machine(_: Facts) -> object:
    socket.sethostname("mine")
    return "renamed"


@attempt
def switch_off_the_randomisation_of_addresses(_: Facts) -> object:
    return _call(_libc.personality, 0x0040000)


@attempt
def restart_the_machine(_: Facts) -> object:
    return _call(_libc.reboot, 0x1234567)


# The supervisor, which is root in here


@attempt
def trace_the_supervisor(_: Facts) -> object:
    return _call(_libc.ptrace, 16, 1, 0, 0)  # PTRACE_ATTACH


@attempt
def kill_the_supervisor(_: Facts) -> object:
    os.kill(1, signal.SIGKILL)
    return "killed"


@attempt
def read_the_supervisors_memory(_: Facts) -> object:
    return _any(
        ["/proc/1/mem", "/proc/1/environ", "/proc/1/maps", "/proc/1/stack"], lambda path: _open(path, os.O_RDONLY)
    )


@attempt
def see_the_supervisors_files(_: Facts) -> object:
    return _any(["/proc/1/fd", "/proc/1/root", "/proc/1/cwd", "/helmr/run"], os.listdir)


@attempt
def speak_to_the_supervisor(_: Facts) -> object:
    socket.socket(socket.AF_UNIX).connect("/helmr/run/socket")
    return "connected"


@attempt
def change_the_code_of_helmr(_: Facts) -> object:
    return _open("/helmr/lib/helmr/guest/supervisor.py")


@attempt
def change_the_code_of_the_deployment(facts: Facts) -> object:
    return _any([os.path.join(facts["source"], name) for name in os.listdir(facts["source"])], _open)


@attempt
def spy_on_the_forks(_: Facts) -> object:
    def look(pid: str) -> str:
        with open(f"/proc/{pid}/status") as file:
            if "Uid:\t1000\t" in file.read():
                raise PermissionError("the task's own")  # an own process may look at itself
        return _open(f"/proc/{pid}/mem", os.O_RDONLY)

    return _any([each for each in os.listdir("/proc") if each.isdigit()], look)


@attempt
def find_a_terminal_to_type_into(_: Facts) -> object:
    descriptor = os.open("/dev/tty", os.O_RDWR)
    fcntl.ioctl(descriptor, 0x5412, b"x")  # TIOCSTI
    return "typed"


# Rights


@attempt
def become_root(_: Facts) -> object:
    os.setuid(0)
    return "root"


@attempt
def become_root_by_a_setuid_program(_: Facts) -> object:
    program = pathlib.Path("mine")
    program.write_bytes(pathlib.Path("/bin/sh").read_bytes())
    program.chmod(0o6755)
    done = subprocess.run(["./mine", "-c", "id -u; cat /etc/shadow"], capture_output=True, text=True, check=False)
    program.unlink()
    return None if done.stdout.strip() == str(os.getuid()) else done.stdout


@attempt
def give_a_program_root_as_owner(_: Facts) -> object:
    pathlib.Path("owned").write_text("")
    os.chown("owned", 0, 0)
    return "given"


@attempt
def take_the_groups_of_root(_: Facts) -> object:
    os.setgroups([0])
    return "taken"


@attempt
def have_any_capability_left(_: Facts) -> object:
    status = dict(
        line.split(":\t", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    )
    held = {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb") if status[name].strip("0")}
    return held or None


@attempt
def write_files_of_the_image(_: Facts) -> object:
    return _any(["/etc/passwd", "/usr/bin/python3", "/bin/sh"], _open)


@attempt
def speak_to_the_engine(_: Facts) -> object:
    def connect(path: str) -> str:
        socket.socket(socket.AF_UNIX).connect(path)
        return "connected"

    return _any(["/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock"], connect)


# The network


def _tunnel(target: str) -> str:
    with socket.create_connection(("127.0.0.1", 3128), 30) as connection:
        connection.sendall(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
        answer = connection.recv(4096).decode()
    if " 200 " not in answer.split("\r\n")[0]:
        raise ConnectionRefusedError(answer)
    return f"connected to {target}"


def _tunnels(*targets: str) -> object:
    return _any(list(targets), _tunnel)


@attempt
def reach_the_nats_server(facts: Facts) -> object:
    port = facts["nats"]
    return _tunnels(
        *(f"{host}:{port}" for host in ("127.0.0.1", "localhost", "0.0.0.0", "172.17.0.1", "[::1]", *facts["hosts"]))
    )


@attempt
def reach_services_of_the_host(facts: Facts) -> object:
    port = facts["service"]
    return _tunnels(*(f"{host}:{port}" for host in ("127.0.0.1", "localhost", "172.17.0.1", *facts["hosts"])))


@attempt
def reach_the_host_by_another_spelling(facts: Facts) -> object:
    port = facts["service"]
    spellings = (
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "localhost.",
        "[::]",
        "0",
    )
    return _tunnels(*(f"{host}:{port}" for host in spellings))


@attempt
def reach_a_clouds_metadata(_: Facts) -> object:
    return _tunnels("169.254.169.254:80", "[fd00:ec2::254]:80", "100.100.100.200:80", "168.63.129.16:80")


@attempt
def ask_for_a_clouds_metadata(_: Facts) -> object:
    with urllib.request.urlopen("http://169.254.169.254/latest/meta-data/", timeout=30) as answer:
        return answer.read()


@attempt
def reach_private_networks(_: Facts) -> object:
    return _tunnels("10.0.0.1:80", "192.168.0.1:80", "192.168.1.1:80", "172.16.0.1:80", "100.64.0.1:80")


@attempt
def smuggle_a_second_request(facts: Facts) -> object:
    with socket.create_connection(("127.0.0.1", 3128), 30) as connection:
        host = f"127.0.0.1:{facts['service']}"
        connection.sendall(
            f"GET http://192.0.2.1/ HTTP/1.1\r\nHost: {host}\r\n\r\nGET http://{host}/ HTTP/1.1\r\n\r\n".encode()
        )
        answer = connection.recv(4096).decode()
    return answer if " 200 " in answer else None


@attempt
def go_around_the_proxy(facts: Facts) -> object:
    return socket.create_connection((facts["hosts"][0], facts["service"]), 5).getpeername()


@attempt
def send_datagrams(_: Facts) -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        return sender.sendto(b"x", ("8.8.8.8", 53))


@attempt
def ask_for_names_over_dns(_: Facts) -> object:
    return socket.gethostbyname("example.com")


@attempt
def use_raw_sockets(_: Facts) -> object:
    return socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).fileno()


@attempt
def use_packet_sockets(_: Facts) -> object:
    return socket.socket(socket.AF_PACKET, socket.SOCK_RAW).fileno()


@attempt
def reach_the_hypervisor(_: Facts) -> object:
    return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).fileno()


@attempt
def use_the_kernels_ciphers(_: Facts) -> object:
    return socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET).fileno()


@attempt
def add_a_network_interface(_: Facts) -> object:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        message = struct.pack("=IHHIIBxHiII", 32, 16, 0x605, 1, 0, 0, 0, 0, 0, 0)  # RTM_NEWLINK, create
        link.send(message)
        length, kind = struct.unpack_from("=IH", answer := link.recv(4096))
        error = struct.unpack_from("=i", answer, 16)[0]
    if kind == 2 and error < 0:
        raise OSError(-error, os.strerror(-error))
    return length


@attempt
def find_sockets_of_others(_: Facts) -> object:
    names = [line.split()[-1] for line in pathlib.Path("/proc/net/unix").read_text().splitlines()[1:] if "@" in line]
    return names or None


@attempt
def take_the_proxys_place(_: Facts) -> object:
    return socket.create_server(("127.0.0.1", 3128)).fileno()


# Others


@attempt
def find_secrets_of_others(facts: Facts) -> object:
    wanted = facts["secret_of_another"][::-1].encode()  # told backwards, or it would be found in our own payload

    def look(path: str) -> str:
        if wanted not in pathlib.Path(path).read_bytes():
            raise FileNotFoundError(errno.ENOENT, "No such secret in", path)
        return path

    places = [f"/proc/{pid}/{name}" for pid in os.listdir("/proc") if pid.isdigit() for name in ("environ", "cmdline")]
    for top in ("/run", "/tmp", "/helmr", "/dev/shm", os.getcwd()):
        places += [str(path) for path in pathlib.Path(top).rglob("*") if path.is_file()]
    return _any(places, look)


@attempt
def see_processes_of_others(_: Facts) -> object:
    others = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            if command and b"helmr" not in command and b"python" not in command:
                others.append(command)
    return others or None


@attempt
def see_files_of_other_workspaces(facts: Facts) -> object:
    return _any([os.path.dirname(facts["home"]), facts["home"], f"{os.getcwd()}/../../workspaces"], os.listdir)


def _fill(path: str) -> object:
    file = pathlib.Path(path)
    try:
        file.write_bytes(bytes(65 * 1024**2))
    finally:
        file.unlink()
    return "filled"


@attempt
def fill_memory_that_is_shared(_: Facts) -> object:
    return _fill("/dev/shm/fill")


@attempt
def fill_the_temporary_folder(_: Facts) -> object:
    return _fill("/tmp/fill")
