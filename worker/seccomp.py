"""The system calls a machine may make: our own list, because what an engine allows by default depends on its age.

Engine 20.10 lets containers use io_uring and vsock, through which both the network policy and much of the kernel's checking
are bypassed. This is an allow-list: what the kernel learns tomorrow is refused until it is named here. Compared with the
default of current engines (``profiles/seccomp/default.json`` of moby) it leaves out what only privileged containers use,
32-bit system calls altogether (no architecture but the machine's own is named), and every address family but those that
programs use: unix, IPv4, IPv6 and netlink.
"""

from __future__ import annotations

import functools
import json
from typing import Any

_FILES = """
    access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 fallocate
    fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat
    fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr getxattrat inotify_add_watch inotify_init
    inotify_init1 inotify_rm_watch ioctl lchown lgetxattr link linkat listxattr listxattrat llistxattr lremovexattr lseek
    lsetxattr lstat mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open openat openat2 pread64 preadv preadv2
    pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv removexattr removexattrat rename renameat renameat2
    rmdir sendfile setxattr setxattrat splice stat statfs statx symlink symlinkat sync sync_file_range sync_file_range2
    syncfs tee truncate umask unlink unlinkat utime utimensat utimes vmsplice write writev fanotify_mark
"""
_WAITING = """
    epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 io_cancel io_destroy
    io_getevents io_pgetevents io_setup io_submit pause pipe pipe2 poll ppoll pselect6 select signalfd signalfd4
"""
_NETWORK = """
    accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg sendmmsg sendmsg sendto
    setsockopt shutdown socketpair
"""
_MEMORY = """
    brk cachestat madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mprotect
    mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease remap_file_pages
"""
_PROCESSES = """
    arch_prctl cacheflush capget capset execve execveat exit exit_group fork futex futex_requeue futex_wait futex_waitv
    futex_wake get_robust_list get_thread_area getcpu getegid geteuid getgid getgroups getpgid getpgrp getpid getppid
    getpriority getresgid getresuid getrlimit getrusage getsid gettid getuid ioprio_get ioprio_set kill
    landlock_add_rule landlock_create_ruleset landlock_restrict_self modify_ldt pidfd_open pidfd_send_signal prctl prlimit64
    process_vm_readv process_vm_writev ptrace restart_syscall riscv_flush_icache riscv_hwprobe rseq rt_sigaction
    rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
    sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp
    set_robust_list set_thread_area set_tid_address set_tls setfsgid setfsuid setgid setgroups setpgid setpriority setregid
    setresgid setresuid setreuid setrlimit setsid setuid sigaltstack sysinfo tgkill tkill uname vfork wait4 waitid
"""
_TIME = """
    adjtimex alarm clock_adjtime clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep setitimer time
    timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times
"""
_SYSTEM_V = """
    mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop
    semtimedop shmat shmctl shmdt shmget getrandom
"""
_GROUPS = (_FILES, _WAITING, _NETWORK, _MEMORY, _PROCESSES, _TIME, _SYSTEM_V)

#: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET: no new namespaces.
_NAMESPACES = 0x7E020000
#: The execution domains that C libraries ask for: plain Linux, 32-bit addresses, UNAME26, both, and "which is it now".
_DOMAINS = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
#: AF_UNIX, AF_INET, AF_INET6, and AF_NETLINK, by which libraries list addresses.
_FAMILIES = (1, 2, 10, 16)
#: EPERM and ENOSYS as Linux numbers them, whatever the worker runs on.
_EPERM, _ENOSYS = 1, 38


@functools.cache
def profile() -> str:
    """The profile as JSON, to be given to the engine as ``seccomp=<json>`` (the API wants the content, not a path)."""
    names = [name for group in _GROUPS for name in group.split()]
    rules = [
        {"names": names, "action": "SCMP_ACT_ALLOW"},
        *(_allowed("socket", 0, family) for family in _FAMILIES),
        *(_allowed("personality", 0, domain) for domain in _DOMAINS),
        _allowed("clone", 0, _NAMESPACES, "SCMP_CMP_MASKED_EQ"),
        # Its flags are behind a pointer where no filter can see them; "no such call" makes C libraries use clone instead.
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS},
    ]
    return json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": _EPERM, "syscalls": rules})


def _allowed(name: str, index: int, value: int, operator: str = "SCMP_CMP_EQ") -> dict[str, Any]:
    condition = {"index": index, "value": value, "valueTwo": 0, "op": operator}
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [condition]}
