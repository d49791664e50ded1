"""A laboratory for algorithms: a tiny language world in which the learner's own code runs in one process.

language      prompts, demonstrations, and what answers are worth (gold)
networks      small Llamas under the real training engine
sampling      samples of a policy, their scores, and their distance from the reference
world         a seed's supervised policy and reward models, cached
arms, units   one run through the real Updater; controllers that are fed the wrong unit
pool          best of n, from one pool of samples a seed
arm_queue     many runs, two at a time, finished ones skipped
plan          seeds, sizes, the learning-rate rule, the command line
verdicts      what curves say of a claim; figures and report publish it
"""
