"""What `scripts/survey.py` is made of: tiny models of any class, requests, references, verdicts.

It may name Transformers freely, for it is no part of the package, and takes nothing from the
tests: what it finds is to stand apart from what they prove.
"""
