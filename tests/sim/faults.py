"""What goes wrong. Each kind strikes at random moments, and never breaks a promise by itself:

nodes are destroyed, and bytes damaged, only as long as what is left can restore all that was
promised. So whatever is lost then was lost by one of ours.
"""

from typing import TYPE_CHECKING

from ckptd.ids import SnapshotId

from .agents import Agent, Machine
from .disk import Damaged
from .processes import SpareLauncher
from .runs import TrainingJob

if TYPE_CHECKING:
    from .world import World


class Faults:
    """Injects the faults of a plan until it is told to stop."""

    def __init__(self, world: "World") -> None:
        self._world, self._clock = world, world.clock
        self._random = world.fault_random
        for name in world.plan.interval_s:
            self._next(name)

    def _next(self, name: str) -> None:
        mean_s = self._world.plan.interval_s[name]
        self._clock.at(self._clock.now + self._random.expovariate(1 / mean_s), self._strike, name)

    def _strike(self, name: str) -> None:
        if not self._world.faults_on:
            return
        if getattr(self, name)():
            self._world.count(name)
        self._next(name)

    # Who is struck.

    def _machine(self) -> Machine:
        return self._random.choice([m for m in self._world.machines.values() if m.alive])

    def _agent(self) -> Agent | None:
        agent = self._machine().agent
        return agent if agent is not None and not agent.asleep else None

    def _job(self) -> TrainingJob | None:
        job = self._random.choice(list(self._world.jobs.values()))
        return job if job.run is not None and not job.run.over else None

    def _uniform(self, low: float, high: float) -> float:
        return self._clock.now + self._random.uniform(low, high)

    # Trainers.

    def kill_trainer(self) -> bool:
        job = self._job()
        if job is None or job.run is None:
            return False
        self._random.choice(job.run.trainers).die()
        self._clock.at(self._uniform(0.0, 0.5), job.fail, self._random.random() < 0.3)
        return True

    def stop_trainer(self) -> bool:
        job = self._job()
        if job is None or job.run is None:
            return False
        trainer = self._random.choice(job.run.trainers)
        trainer.stop()
        self._clock.at(self._uniform(0.1, 6.0), trainer.wake)
        if self._random.random() < 0.5:
            self._clock.at(self._uniform(0.1, 3.0), job.fail, True)
        return True

    def restart_job(self) -> bool:
        job = self._job()
        if job is None or job.run is None:
            return False
        job.restart()
        return True

    # Agents and nodes.

    def restart_agent(self) -> bool:
        machine = self._machine()
        if machine.agent is None:
            return False
        machine.kill_agent((0.05, 1.5))
        return True

    def stop_agent(self) -> bool:
        agent = self._agent()
        if agent is None:
            return False
        self._world.story.tell(agent.machine.name, "its agent is stopped")
        agent.asleep = True
        self._clock.at(self._uniform(0.05, 2 * self._world.plan.settings.lease_s), agent.wake)
        return True

    def destroy_node(self) -> bool:
        machine = self._machine()
        if not self._world.truth.survives(machine):
            return False
        jobs = [job for job in self._world.jobs.values() if machine in job.pool]
        if not jobs:
            return False
        jobs += self._waited_for(machine)
        machine.destroy()
        self._fail_jobs_on(machine)
        generation, name = machine.generation + 1, machine.name
        if self._random.random() < 0.7:
            name, generation = "", 0
        self._clock.at(self._uniform(0.3, 3.0), self._replace, name, generation, jobs)
        return True

    def _replace(self, name: str, generation: int, jobs: list[TrainingJob]) -> None:
        machine = self._world.add_machine(name, generation)
        for job in jobs:
            SpareLauncher(machine, job)

    def wipe_node(self) -> bool:
        machine = self._machine()
        if not self._world.truth.survives(machine):
            return False
        jobs = self._waited_for(machine)
        machine.wipe()
        self._fail_jobs_on(machine)
        for job in jobs:
            SpareLauncher(machine, job)
        return True

    def _waited_for(self, machine: Machine) -> list[TrainingJob]:
        """The jobs for which it is a spare."""
        return [p.job for p in machine.processes if isinstance(p, SpareLauncher)]

    def _fail_jobs_on(self, machine: Machine) -> None:
        for job in self._world.jobs.values():
            if job.run is not None and any(t.machine is machine for t in job.run.trainers):
                self._clock.at(self._uniform(0.0, 0.5), job.fail, self._random.random() < 0.2)

    # Connections.

    def cut_off(self) -> bool:
        machine = self._machine()
        if machine.cut or machine.agent is None:
            return False
        machine.cut = True
        machine.agent.break_connection((0.0, 0.5))
        lease_s = self._world.plan.settings.lease_s
        self._clock.at(self._uniform(0.1, 2.5 * lease_s), self._world.heal, machine)
        self._world.story.tell(machine.name, "is cut off from the coordinator")
        return True

    def mute(self) -> bool:
        """What it says is held up for a while; what it is told is not."""
        agent = self._agent()
        if agent is None or agent.connection.muted:
            return False
        connection = agent.connection
        connection.muted = True
        lease_s = self._world.plan.settings.lease_s
        self._clock.at(self._uniform(0.1, 1.5 * lease_s), connection.unmute)
        self._world.story.tell(agent.machine.name, "is not heard by the coordinator")
        return True

    def reset_connection(self) -> bool:
        agent = self._agent()
        if agent is None or not agent.connection.open:
            return False
        agent.break_connection((0.0, 0.05))
        return True

    def part_peers(self) -> bool:
        one, other = self._machine().name, self._machine().name
        pair = frozenset((one, other))
        if one == other or pair in self._world.parted:
            return False
        self._world.parted.add(pair)
        self._clock.at(self._uniform(0.2, 5.0), self._world.parted.discard, pair)
        self._world.story.tell(one, "and", other, "do not reach each other")
        return True

    # The coordinator.

    def restart_coordinator(self) -> bool:
        coordinator = self._world.coordinator
        if coordinator.decider is None:
            return False
        coordinator.kill()
        self._clock.at(self._uniform(0.05, 2.0), coordinator.start)
        return True

    def stop_coordinator(self) -> bool:
        if not self._world.coordinator.at_work:
            return False
        self._world.coordinator.stop()
        lease_s = self._world.plan.settings.lease_s
        self._clock.at(self._uniform(0.1, 2 * lease_s), self._world.coordinator.wake)
        return True

    def replace_coordinator(self) -> bool:
        """One that is stopped is replaced by hand, and wakes up later."""
        world, old = self._world, self._world.coordinator
        if not old.at_work or any(other.decider is not None for other in world.others):
            return False
        old.stop()
        old.was_in_office = True
        world.coordinator = world.add_coordinator(take_over=True)
        world.others.append(old)
        machines = [machine for machine in world.machines.values() if machine.alive]
        for machine in machines:
            machine.routed = old
            self._clock.at(self._uniform(0.0, 2.0), world.lead, machine, None)
        lease_s = world.plan.settings.lease_s
        self._clock.at(self._uniform(0.1, lease_s), old.wake)
        for machine in self._some(machines):  # led astray again
            self._clock.at(self._uniform(2.0, 4.0), world.lead, machine, old)
            self._clock.at(self._uniform(4.0, 6.0), world.lead, machine, None)
        self._clock.at(self._uniform(6.0, 7.0), old.kill)
        return True

    def rival_coordinator(self) -> bool:
        """The network is parted, and somebody starts a second coordinator on the other side."""
        world = self._world
        if not world.coordinator.at_work or any(o.decider is not None for o in world.others):
            return False
        rival = world.add_coordinator()
        world.others.append(rival)
        side = self._some([machine for machine in world.machines.values() if machine.alive])
        until = self._uniform(0.2, 0.9 * world.plan.settings.lease_s)
        for machine in side:
            world.lead(machine, rival)
            self._clock.at(until, world.lead, machine, None)
        self._clock.at(until, rival.kill)
        return True

    def _some(self, machines: list[Machine]) -> list[Machine]:
        return self._random.sample(machines, self._random.randint(1, len(machines)))

    # People.

    def roll_back(self) -> bool:
        job = self._job()
        return job is not None and self._world.people.roll_back(job)

    def isolate(self) -> bool:
        return self._world.people.isolate(self._machine())

    # Bytes.

    def flip_bit(self) -> bool:
        """In a sealed segment, or in parity, at rest."""
        machine = self._machine()
        disk = machine.disk
        names = [n for n, f in disk.files.items() if f.header or n in disk.parity_seals]
        if not names:
            return False
        name = self._random.choice(names)
        file = disk.files[name]
        before, at_stake = file.data, self._at_stake(machine, name)
        file.data = Damaged(file.data)
        if not self._harmless(at_stake):
            file.data = before
            return False
        self._world.story.tell(machine.name, "a bit flips in", name)
        return True

    def lose_file(self) -> bool:
        """While the agent is away."""
        machine = self._machine()
        disk = machine.disk
        if machine.agent is None or not disk.files:
            return False
        name = self._random.choice(list(disk.files))
        at_stake = self._at_stake(machine, name)
        kept = disk.files.pop(name), disk.seals.pop(name, None), disk.parity_seals.pop(name, None)
        if not self._harmless(at_stake):
            disk.files[name] = kept[0]
            if kept[1] is not None:
                disk.seals[name] = kept[1]
            if kept[2] is not None:
                disk.parity_seals[name] = kept[2]
            return False
        self._world.story.tell(machine.name, "loses", name)
        machine.kill_agent((0.05, 0.5))
        return True

    def _at_stake(self, machine: Machine, name: str) -> list[SnapshotId]:
        """What the loss of a file must leave restorable; nothing protects a job on one node."""
        job = self._world.jobs[name.split("/")[0]]
        return self._world.truth.at_stake(job.name, machine) if job.nodes > 1 else []

    def _harmless(self, at_stake: list[SnapshotId]) -> bool:
        return bool(at_stake) and all(self._world.truth.restorable(id) for id in at_stake)
