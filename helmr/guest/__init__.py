"""The in-container runtime: the supervisor that starts, relays and ends process trees, and the runner that calls tasks.

Standard library only, Python >= 3.10, because the folder is mounted into whatever image a sandbox names. It has a process for
each job, so that none can disturb another::

    supervisor       talks to the worker over a unix socket, relays output, keeps what is not acknowledged
    └── zygote       has imported what tasks need, sees no secret, forks
        └── shim     one per process tree at a time: adopts its orphans, keeps its deadline, ends it, reports how it ended
            └── the task, or the program executed; or a template, which has imported the module of a task
                └── the task
"""
