"""What the doctor judges by: for each check a function that says what was found, and one that yields what is wrong.

`say_...` answers a line, "" where there was nothing to look at. `find_...` yields findings.
"""
