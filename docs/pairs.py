"""The pairs that the home page shows, from a trained run:
python docs/pairs.py results/scenes/alad-alignment-and-matching-distill/seed-88

Captions of the test set at even distance, of those that are short and whose picture the alignment head ranks first;
written to docs/pairs.json with where the model comes from."""
import argparse
from pathlib import Path

from aladin.files import read_json, write_json
from aladin.view.explorer import open_explorer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="run folder with a model")
parser.add_argument("--count", type=int, default=5, help="how many (default: 5)")
run, count = (a := parser.parse_args()).run, a.count

explorer, found = open_explorer(run, progress=False), []
short = [(image, text) for image, text in explorer.listed if 6 <= len(text.split()) <= 10]
for image, text in (short[len(short)*i//40] for i in range(40)):
    answer = explorer.look(text, heads=["alignment"])
    if answer["image"] != image: continue
    found.append(dict(caption=text, image=image, picture=answer["pictures"][image], **answer["pair"]))
    if len(found) == count: break
write_json(Path(__file__).parent/"pairs.json",
           dict(pairs=found, **{"made by": read_json(run/"training.json")["made by"]}))
print(*(f"{p['image']}  {p['score']:.2f}  {p['caption']}" for p in found), sep="\n")
