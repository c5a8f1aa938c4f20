"""One call: plan, encode, choose, shorten, run, restore, report; and what is refused.

The steps hand data down and do not climb back.
May import all of `runtime` but `attach` and `family`, and what stands below `runtime`.
"""
