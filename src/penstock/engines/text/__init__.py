"""Everything between text and token ids, for any ``tokenizer.json``.

`TextModel` turns a request into prompt ids. `Reply` turns one choice's token ids back into text as they come: it
detokenizes incrementally, holds back what may become a stop string, and knows when the reply ends. Both are pure
functions of their input, so replaying a logged prefix through a new `Reply` rebuilds the state of the old one.
"""
