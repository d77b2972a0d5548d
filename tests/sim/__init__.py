"""A simulator: the real deciders against a hostile world, all of it drawn from one seed.

`python -m tests.sim --seeds 1-1000` runs a campaign, `--seed N --story` tells one of them.

    kernel.py     clock, story, violations      plan.py       what a seed draws
    disk.py       a memory directory            transfers.py  encode and fetch, by value
    agents.py     a node and its agent          control.py    connections, and the coordinator
    offices.py    whom agents may obey          people.py     rollbacks and isolation
    processes.py  what runs on a node           faults.py     what goes wrong
    trainers.py   ranks                         runs.py       runs of a job, and its launcher
    truth.py      what really is, and what must hold
    world.py      all of it together            campaign.py   many seeds
    planted*.py   bugs that must be found       scale.py      what many nodes cost
"""
