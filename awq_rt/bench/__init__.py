"""`awq-rt bench`: how fast a model answers, beside how fast the device's memory would let it.

shapes      the sizes of well-known models
synthetic   a checkpoint of random weights in such a shape
dense       the same model in float16
bandwidth   how fast the device reads
limit       the bytes that a step reads
measure     one case on one model
load_time   loading beside reading the files
session     all cases on all models that were asked for
report      rows, tables and JSON
plots       PNG
"""
