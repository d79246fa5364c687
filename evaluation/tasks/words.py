"""The words of keys, written for this project. The first of each list are short and common: small tasks use those.

No adjective ends with another adjective and no noun begins with another noun, so that one adjective-noun pair is never
found inside another. The tests hold this.
"""

from __future__ import annotations

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES: Final = _words(
    """
    red blue green black white gray pink dark light warm cold cool soft hard wet dry big tiny tall short long wide
    thin thick deep flat round sharp slow fast new vast early late calm wild brave kind proud shy loud quiet sweet
    sour bitter salty fresh stale clean dirty rich poor young ancient modern simple plain fancy strong weak heavy
    empty full open closed broken whole smooth rough shiny dull bright dim clear cloudy sunny rainy windy snowy
    foggy stormy misty frosty icy dusty muddy sandy rocky grassy leafy woody mossy thorny rusty golden silver copper
    wooden woolen silken paper marble velvet amber scarlet crimson purple violet indigo ivory hazel olive maroon
    teal beige lively sleepy drowsy weary eager lazy busy idle clever foolish wise silly serious funny merry gloomy
    cheerful gentle fierce tame timid bold humble polite rude honest sly cunning loyal fickle steady shaky nimble
    clumsy agile sturdy delicate brittle elastic rigid hollow solid liquid frozen molten steamy smoky hazy vivid
    faint muffled silent noisy musical rhythmic distant nearby remote local coastal rural urban alpine arctic
    tropical desert lunar solar stellar cosmic magnetic electric atomic digital mechanical curious puzzled dazzled
    startled grateful jolly jovial peppy zesty minty tangy crispy crunchy creamy fluffy furry plumed striped spotted
    dappled speckled patterned twisted curly crooked slanted tilted upright hidden secret famous obscure common rare
    unusual peculiar ordinary splendid superb humid arid lofty shallow hungry thirsty wealthy frugal generous
    patient restless tireless careful reckless
    """
)

NOUNS: Final = _words(
    """
    dog cat cow pig fox owl bird fish frog bear wolf lion tree leaf rose rock lake river hill cave moon star cloud
    storm rain fire stone sand road bridge tower house door window table chair lamp clock book pencil letter box bag
    cup plate spoon knife fork bottle basket ladder hammer bolt screw wheel engine boat ship train truck plane kite
    drum flute violin piano guitar trumpet bell whistle song waltz poem story riddle puzzle game toy doll marble
    ball apple pear plum peach grape melon lemon orange banana cherry berry walnut almond olive onion carrot potato
    tomato pepper garlic turnip lettuce spinach bean lentil rice wheat barley bread butter cheese honey sugar salt
    soup salad cake cookie pudding coffee cider juice milk water horse donkey mule goat sheep rabbit squirrel beaver
    otter badger weasel ferret hedgehog mole mouse hamster turtle tortoise lizard gecko snake toad newt salmon trout
    shark whale dolphin seal walrus penguin puffin gull heron stork crane swan goose duck chicken turkey sparrow
    robin raven falcon eagle hawk vulture parrot aphid spider cricket moth wasp bee hornet ladybug dragonfly snail
    slug worm crab lobster shrimp oyster coral kelp meadow forest jungle swamp valley canyon glacier volcano island
    beach harbor lagoon desert prairie tundra orchard garden vineyard barn castle cottage palace temple museum
    library market bazaar factory stadium airport tunnel avenue sailor farmer baker tailor doctor painter singer
    dancer writer teacher pilot miner hunter knight wizard giant dwarf pirate lantern candle mirror carpet curtain
    pillow blanket mitten jacket sweater button zipper needle thread ribbon anchor compass telescope magnet crystal
    """
)
