"""The same stages on the workers of a Ray cluster, with the same results to the bit.

with Crew(Ray(workers=4), Bench(base=base, tuned=tuned)) as crew:
    listen(model, tokenizer, saes, texts, spread=crew.listening)
    calibrate(model, edits, texts, z, spread=crew.injecting, ...)
    evaluate(model, tokenizer, arms, tasks, spread=crew.answering(plans), ...)
"""

from stethoscope.scaling.bench import Bench
from stethoscope.scaling.crew import Crew

__all__ = ["Bench", "Crew"]
