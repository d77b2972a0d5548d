"""A simulator: the real deciders against a hostile world, all of it drawn from one seed.

`python -m tests.sim --seeds 1-1000` runs a campaign, `--seed N --story` tells one of them.

    kernel.py     clock, story, violations      plan.py       what a seed draws
    disk.py       a memory directory            transfers.py  encode and fetch, by value
    agents.py     a node and its agent          control.py    connections, and the coordinator
    trainers.py   ranks, runs and launchers     faults.py     what goes wrong
    truth.py      what really is, and what must hold
    world.py      all of it together            campaign.py   many seeds
    planted.py    bugs that must be found
"""
