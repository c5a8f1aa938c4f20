"""One call: plan, encode, choose, shorten, run, restore, report; and what is refused.

The steps hand data down and do not climb back.
May import all other rooms of `runtime`.
"""
