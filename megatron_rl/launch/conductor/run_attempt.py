"""One attempt: the shell around `decide`, which starts roles, checks them, and reports what happened."""

import os
import socket
import sys
import time
import urllib.request
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Tuple

from megatron_rl.launch.conductor.commands_of_steps import Filled, make_url
from megatron_rl.launch.conductor.control_files import read_json, remove, write_json
from megatron_rl.launch.conductor.decide import TRAINER, Action, Attempt, Event, Rules, decide
from megatron_rl.launch.conductor.port_block import FIRST_ENGINE, MASTER
from megatron_rl.launch.conductor.role_processes import RoleProcesses, find_logs, last_lines
from megatron_rl.launch.conductor.run_files import RunFiles
from megatron_rl.launch.conductor.run_preflight import Preflight
from megatron_rl.launch.conductor.run_task import first_bad_task, forget_exits
from megatron_rl.launch.conductor.slurm_commands import end_of_job

LOOK_S, HEALTH_S, BEAT_S, DEADLINE_S = 0.25, 1.0, 10.0, 60.0  # seconds between two looks of each kind
SHOWN_LINES = 30


class JobHosts(NamedTuple):
    """Where an attempt runs: the name of the job for Slurm (empty: this machine), and the hosts of each group."""

    key: str
    groups: Tuple[Tuple[str, ...], ...]

    @property
    def hosts(self) -> Tuple[str, ...]:
        """All hosts."""
        return tuple(host for group in self.groups for host in group)

    def of_role(self, role: Mapping[str, Any]) -> Tuple[str, ...]:
        """Return the hosts of a role."""
        first = role["first_node"]
        return self.groups[role["group"]][first : first + role["nodes"]]


class AttemptRunner:
    """Runs one attempt from its start to its end."""

    def __init__(self, job: Mapping[str, Any], place: JobHosts, files: RunFiles, signals: List[str]) -> None:
        """Take the job, where it runs, the run's files, and the list to which signal handlers append names."""
        self._job, self._place, self._files, self._signals = job, place, files, signals
        self._roles = {role["name"]: dict(role) for role in job["roles"]}  # a restart changes the node of one
        engines = [role for role in job["roles"] if role["kind"] == "engine"]
        names, nodes = (tuple(role[key] for role in engines) for key in ("name", "first_node"))
        self._rules = Rules(engines=names, nodes=nodes, **job["rules"])
        self._processes = RoleProcesses(job, place.key)
        self._preflight = Preflight(job, place.groups, files, say)
        self.state = Attempt()
        self._filled = Filled(files.number, files.logs, {}, {}, place.key)
        self._timers: Dict[str, float] = {}

    def run(self) -> Attempt:
        """Run the attempt, and return what is known at its end."""
        self._happened(Event("start", now=time.time()))
        while self.state.phase != "over":
            for event in self._look():
                self._happened(event)
            time.sleep(LOOK_S)
        return self.state

    def give_up(self) -> None:
        """Kill what still runs, after an error of the conductor's own."""
        for name in sorted(self.state.alive):
            self._processes.kill(name)
        self.state = self.state._replace(phase="over", first_bad=(TRAINER, 1))

    def suspects(self) -> Tuple[str, ...]:
        """Return the node on which a role failed first: that of the task that ended first, or the role's only node."""
        if self.state.first_bad is None or not self._place.key:
            return ()
        role = self.state.first_bad[0]
        task = first_bad_task(self._files.logs, role)
        hosts = self._place.of_role(self._roles[role]) if task is None else (str(task["host"]),)
        return hosts if len(hosts) == 1 else ()

    def _happened(self, event: Event) -> None:
        self.state, actions = decide(self._rules, self.state, event)
        for action in actions:
            _ACTIONS[action.kind](self, action)

    def _look(self) -> List[Event]:
        """Return what has happened since the last look."""
        now = time.time()
        events = [Event("signal", text=name, now=now) for name in self._take_signals()]
        for name, code in sorted(self._processes.ended().items(), key=lambda pair: (pair[0] != TRAINER, pair[0])):
            task = first_bad_task(self._files.logs, name) if code else None
            code = code if task is None else int(task["code"])
            where = "" if task is None else " (task %d on %s)" % (task["rank"], task["host"])
            say("%s ended with exit code %d%s" % (name, code, where))
            remove(self._files.engine(name))  # the trainer then sends it no request
            events.append(Event("ended", name, code, self._own_stop(name), now=now))
        stop = read_json(self._files.control("stop"))
        if stop is not None and not self.state.reason:
            events.append(Event("stop", text=str(stop.get("reason", "user")), now=now))
        if self._due("health", HEALTH_S):
            events += [Event("ready", name, now=now) for name in self._newly_healthy()]
        if self._due("beat", BEAT_S):
            self.beat()
        if self._place.key and self._due("deadline", DEADLINE_S):
            events += self._read_deadline()
        events.append(Event("tick", now=now))
        return events

    def beat(self) -> None:
        """Write that this conductor works, so that no other job starts in the run folder."""
        beat = {"time": time.time(), "phase": self.state.phase, "job": self._place.key}
        write_json(self._files.control("conductor"), beat)

    def _take_signals(self) -> List[str]:
        taken = list(self._signals)
        del self._signals[: len(taken)]
        for name in taken:
            say("got SIG%s" % name)
        return taken

    def _own_stop(self, name: str) -> str:
        """Return `deadline` if the trainer saved and stopped by itself before the end of the allocation, else nothing.

        Any other stop without a request is a failure: srun also sends TERM to rank 0 when another rank has died.
        """
        stopped = read_json(self._files.control("stopped.json")) if name == TRAINER else None
        return "deadline" if stopped is not None and stopped.get("reason") == "deadline" else ""

    def _due(self, name: str, period: float) -> bool:
        now = time.monotonic()
        if now < self._timers.get(name, 0.0):
            return False
        self._timers[name] = now + period
        return True

    def _read_deadline(self) -> List[Event]:
        end = end_of_job(self._place.key, os.environ)
        if not end:
            return []
        write_json(self._files.control("deadline"), {"time": end})
        return [Event("deadline", now=end)]

    def _newly_healthy(self) -> List[str]:
        """Return the engines that have become healthy, and register them for the trainer."""
        if self.state.phase not in ("engines", "training"):
            return []
        found = []
        for name in sorted(self.state.alive - self.state.ready - {TRAINER}):
            url = make_url(self._filled.addresses[name], self._filled.ports[name])
            if is_healthy(url):
                say("%s is healthy at %s" % (name, url))
                # By pid and host the trainer distinguishes an engine from the one before it at this URL.
                process = {"pid": self.state.restarts.count(name), "host": self._place.of_role(self._roles[name])[0]}
                write_json(self._files.engine(name), dict(process, url=url))
                found.append(name)
        return found

    # Actions.

    def _check_nodes(self, action: Action) -> None:
        refused = self._preflight.run()
        self._happened(Event("preflight", code=1 if refused else 0, nodes=refused, now=time.time()))

    def _start(self, action: Action) -> None:
        role = self._roles[action.role]
        if action.role in self.state.restarts:
            self._prepare_restart(role)
        if role["kind"] == "engine":
            self._fill(role)
        hosts = self._place.of_role(role)
        own = dict(self._preflight.interface_of(hosts))
        own["MEGATRON_RL_ATTEMPT"] = str(self._files.number)
        own["MEGATRON_RL_ROLE"] = action.role
        own["OMP_NUM_THREADS"] = str(max(1, role["cpus"]))
        if role["kind"] == "trainer" and self._place.key:
            own["MASTER_ADDR"] = hosts[0]
            own["MASTER_PORT"] = str(self._preflight.base + MASTER)
        say("starting %s on %s" % (action.role, ", ".join(hosts)))
        self._processes.start(role, self._filled, own)

    def _fill(self, role: Mapping[str, Any]) -> None:
        """Give an engine its address and its port."""
        name = role["name"]
        self._filled.addresses[name] = resolve_host(self._place.of_role(role)[0])
        self._filled.ports[name] = self._preflight.base + FIRST_ENGINE + self._rules.engines.index(name)

    def _prepare_restart(self, role: Dict[str, Any]) -> None:
        """Choose the node of an engine that is started again, and forget how it ended before."""
        home = self._rules.nodes[self._rules.engines.index(role["name"])]
        if home in self.state.moved:
            group = self._place.groups[role["group"]]
            role["first_node"] = len(group) - self._rules.spares + self.state.moved.index(home)
        # By name: Slurm numbers the nodes of a job anew when it has lost one.
        role["host"] = self._place.of_role(role)[0]
        forget_exits(self._files.logs, role["name"])

    def _write_stop(self, action: Action) -> None:
        say("asking the trainer to save and stop (%s)" % action.text)
        write_json(self._files.control("stop"), {"reason": action.text, "attempt": self._files.number})

    def _show(self, action: Action) -> None:
        """Print the end of the log of the role that failed first."""
        hosts = ", ".join(self._place.of_role(self._roles[action.role]))
        say("%s failed first%s (on %s)" % (action.role, ": " + action.text if action.text else "", hosts))
        task = first_bad_task(self._files.logs, action.role)
        first = "" if task is None else "-%s-%d.log" % (task["host"], task["rank"])
        paths = find_logs(self._files.logs, action.role)
        for path in sorted(paths, key=lambda path: not (first and path.endswith(first)))[:2]:
            lines = last_lines(path, SHOWN_LINES)
            if lines:
                say("the end of %s:\n    %s" % (path, "\n    ".join(lines)))

    def _note(self, action: Action) -> None:
        hosts = ", ".join(self._place.of_role(self._roles[action.role]))
        say("%s is lost (on %s): %s" % (action.role, hosts, action.text))

    def _term(self, action: Action) -> None:
        self._processes.term(action.role)

    def _kill(self, action: Action) -> None:
        self._processes.kill(action.role)

    def _finish(self, action: Action) -> None:
        pass  # the loop ends, because the phase is over


_ACTIONS: Dict[str, Callable[["AttemptRunner", Action], None]] = {
    "preflight": AttemptRunner._check_nodes,
    "start": AttemptRunner._start,
    "write_stop": AttemptRunner._write_stop,
    "term": AttemptRunner._term,
    "kill": AttemptRunner._kill,
    "show": AttemptRunner._show,
    "note": AttemptRunner._note,
    "finish": AttemptRunner._finish,
}


def say(text: str) -> None:
    """Print a line with the time of day."""
    sys.stdout.write("[%s conductor] %s\n" % (time.strftime("%H:%M:%S"), text))
    sys.stdout.flush()


def is_healthy(url: str) -> bool:
    """Return whether a server returns 200 for /health within 2 s."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know the nodes
    try:
        with opener.open(url + "/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError):
        return False


def resolve_host(host: str) -> str:
    """Return the address of a host of the job as the conductor's node sees it.

    Raises:
        OSError: the host is unknown, or its only addresses are loopback.
    """
    addresses = [str(one[4][0]) for one in socket.getaddrinfo(host, None, 0, socket.SOCK_STREAM)]
    usable = [one for one in addresses if not one.startswith("127.") and one != "::1"]
    if not usable:
        raise OSError("%s has only the loopback address %s: mend /etc/hosts" % (host, addresses[0]))
    return usable[0]
