"""Makes tools/tiny/subjects.png: the artwork that the embedded model learns from, 64x64 RGBA cells in one sheet.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python tools/tiny_subjects.py package

The artwork is Google's Noto Emoji (Apache-2.0). The names below are the words that captions use.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

COLUMNS, CELL = 16, 64
HERE = Path(__file__).parent / "tiny"

# short name in the package, and the caption's words where they differ
SUBJECTS = """
watermelon, lemon, banana, pineapple, apple=red apple, green_apple=green apple, pear, peach, strawberry, tomato,
coconut, avocado, eggplant, carrot, corn=corn cob, hot_pepper=chili pepper, bell_pepper=bell pepper, cucumber,
broccoli, onion, bread=loaf of bread, croissant, pretzel, pancakes=stack of pancakes, cheese_wedge=piece of cheese,
poultry_leg=chicken leg, hamburger, fries=box of french fries, pizza=slice of pizza, hotdog=hot dog, sandwich, taco,
popcorn=box of popcorn, rice_ball=rice ball, ramen=bowl of noodles, sushi=piece of sushi, icecream=soft ice cream,
doughnut, cookie, birthday=birthday cake, cake=piece of cake, cupcake, chocolate_bar=chocolate bar, lollipop,
honey_pot=honey pot, coffee=cup of coffee, teapot, beer=mug of beer, bubble_tea=bubble tea, monkey_face=monkey, dog,
wolf, fox_face=fox, raccoon, cat, lion_face=lion, tiger, horse, unicorn_face=unicorn, zebra_face=zebra, cow, pig,
sheep, camel, giraffe_face=giraffe, elephant, mouse, hamster, rabbit, hedgehog, bat, bear, koala, panda_face=panda,
rooster, baby_chick=chick, penguin, eagle, duck, swan, owl, flamingo, peacock, parrot, frog, crocodile, turtle, snake,
dragon, t-rex=dinosaur, whale, dolphin, fish, tropical_fish=tropical fish, shark, octopus, crab, lobster, snail,
butterfly, bee, ladybug, spider, rose, sunflower, tulip, evergreen_tree=pine tree, palm_tree=palm tree, cactus,
maple_leaf=maple leaf, four_leaf_clover=clover, mushroom, crown, tophat=top hat, gem=diamond, guitar, trumpet,
tv=television, camera, bulb=light bulb, candle, books=stack of books, moneybag=bag of money, key, lock, magnet,
rocket, airplane, car, bus, boat=sailboat, anchor, house, tent, volcano, snowman, fire=flame, umbrella, rainbow,
balloon, gift, trophy, soccer=soccer ball, basketball, teddy_bear=teddy bear, jack_o_lantern=pumpkin,
christmas_tree=christmas tree, alarm_clock=alarm clock, sunny=sun, crescent_moon=moon, star,
kiwifruit=kiwi, fried_egg=fried egg, pie, hammer, helicopter, violin, green_salad=salad, waffle,
cherry_blossom=cherry blossom
"""


def main(package: Path) -> None:
    """Write subjects.png and subjects.json (the captions' nouns, in the sheet's order, row by row)."""
    images = {entry["short_name"]: entry["image"] for entry in json.loads((package / "emoji.json").read_text())}
    pairs = [item.strip().partition("=") for item in SUBJECTS.split(",")]
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(pairs) // COLUMNS) * CELL))
    for k, (short_name, _, _) in enumerate(pairs):
        picture = Image.open(package / "img" / "google" / "64" / images[short_name]).convert("RGBA")
        sheet.paste(picture, (k % COLUMNS * CELL, k // COLUMNS * CELL))
    sheet.save(HERE / "subjects.png", optimize=True)
    names = [words or short_name for short_name, _, words in pairs]
    (HERE / "subjects.json").write_text(json.dumps(names, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
