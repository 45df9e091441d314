"""Try the claims of the ORPO paper (arXiv 2403.07691) on small models and real pairs.

study: the trainings. check: the verdicts. experiments, cost, graders, answers: what is
measured. figures, page: docs/paper.md.
"""
