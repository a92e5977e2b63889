"""Write the items that the package carries, from the generators; the same bytes every time.

pip install --no-deps -r demo/constraints-generate.txt
python demo/scripts/make_items.py
"""

from stethoscope_demo.tasks import generate_items

for path, text in generate_items():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path.name, len(text.splitlines()))
