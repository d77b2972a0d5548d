"""How much of a processor the detector takes for a large job.

`python -m tests.diagnosis.load`: simulated sketches of all nodes, decoded and observed once a
period, with `findings` asked for twice in it. Prints CPU seconds, and their share of the period.
"""

import argparse
import time
from statistics import mean

import msgspec

from ckptd.coordinator.diagnosis import Detector
from ckptd.sketches import Sketch

from .simulation import Fault, Job, Shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=1250, help="of 8 stages of 8 ranks")
    parser.add_argument("--periods", type=int, default=24)
    parser.add_argument("--period", type=float, default=2.0, help="seconds between sketches")
    parser.add_argument("--step", type=float, default=2.0, help="seconds")
    options = parser.parse_args()
    shape = Shape(
        data=options.replicas,
        pipeline=8,
        tensor=8,
        microbatches=2,
        layers=1,
        step_s=options.step,
        hiccups=1e-8,
    )
    hang_at = int(0.8 * options.periods * options.period / options.step)
    job = Job(shape, 1, Fault("hang", hang_at, ranks=(shape.ranks // 2,)))
    detector, decoder = Detector(), msgspec.msgpack.Decoder(Sketch)
    shares: list[float] = []
    print(f"{shape.ranks} ranks on {shape.nodes} nodes, a sketch every {options.period} s")
    for number in range(1, options.periods + 1):
        at = number * options.period
        while job.now <= at:
            job.run_step()
        frames = [msgspec.msgpack.encode(sketch) for sketch in job.sketches(at)]
        began = time.process_time()
        sketches = [decoder.decode(frame) for frame in frames]
        decoded = time.process_time()
        for sketch in sketches:
            detector.observe(sketch, at)
        observed = time.process_time()
        found = [*detector.findings(at), *detector.findings(at + options.period / 2)]
        ended = time.process_time()
        shares.append((ended - began) / options.period)
        print(
            f"{at:6.1f} s: decode {decoded - began:.3f}, observe {observed - decoded:.3f}, "
            f"findings {ended - observed:.3f}; {shares[-1]:.1%} of a core; "
            f"{sum(map(len, frames)) / len(frames):.0f} bytes a sketch"
        )
        for finding in found:
            print(f"  {finding.kind.value}: {finding.sentence}")
    later = shares[1:]  # the first one learns of all groups
    print(
        f"after the first: mean {mean(later):.1%} of a core, {min(later):.1%} to {max(later):.1%}"
    )


if __name__ == "__main__":
    main()
