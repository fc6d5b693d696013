"""Bad input by number: what is damaged (one module a format), and the ways in that it is given to.

`damage` spoils bytes, `trees` spoils the nodes of JSON and YAML, `places` puts what is no file in
the place of one; `sandbox` runs each case in a process of its own, within bounds.
"""
