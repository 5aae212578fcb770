"""Judgements about emoji names: which to leave out, what to call them, which mean the same."""


def _names(text: str) -> set[str]:
    return {" ".join(name.split()) for name in text.split(";")}


def _words(text: str) -> set[str]:
    return set(text.split())


# One of several pictures that nobody tells apart at 128 px, or that no short phrase tells apart.
LOOK_ALIKES = _names("""
grinning face with smiling eyes; smiling face; kissing face with closed eyes; kissing face with
smiling eyes; slightly frowning face; anguished face; frowning face with open mouth; disappointed
face; hushed face; face with diagonal mouth; dotted line face; tired face; cat face; heart suit;
person: beard; sports medal; cat with wry smile; grinning cat with smiling eyes; revolving hearts;
beating heart; light blue heart; grey heart; right anger bubble; left speech bubble; eye in speech
bubble; raised back of hand; hand with fingers splayed; rightwards hand; leftwards hand; palm down
hand; palm up hand; leftwards pushing hand; rightwards pushing hand; pinched fingers; hand with
index finger and thumb crossed; love-you gesture; backhand index pointing right; backhand index
pointing up; middle finger; left-facing fist; right-facing fist; oncoming fist; mechanical leg;
breast-feeding; pregnant man; pregnant person; merperson; mx claus; person pouting; person
gesturing no; busts in silhouette; family; child; service dog; water buffalo; rat; globe showing
americas; globe showing asia-australia; japanese post office; love hotel; department store; light
rail; railway car; high-speed train; tram car; mountain cableway; hourglass not done; waxing
crescent moon; waxing gibbous moon; waning gibbous moon; waning crescent moon; last quarter moon;
last quarter moon face; sun behind small cloud; sun behind large cloud; snowman without snow;
speaker low volume; speaker medium volume; mobile phone with arrow; dvd; page with curl; incoming
envelope; outbox tray; magnifying glass tilted right; head shaking horizontally; head shaking
vertically; women holding hands; men holding hands; woman and man holding hands; closed mailbox
with lowered flag; open mailbox with lowered flag; yen banknote; pound banknote; chart increasing
with yen; tear-off calendar; locked with pen
""")
CLOCK_KEPT = "three o'clock"
KEPT_VARIANTS = {"mermaid"}  # better known than its neutral form

# Names that nobody says, or that do not stand after "a".
RELABEL = {
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "star-struck": "star-struck face",
    "pile of poo": "pile of poop",
    "dizzy": "dizzy star",
    "dashing away": "dashing cloud",
    "call me hand": "shaka hand",
    "sign of the horns": "hand making the sign of the horns",
    "backhand index pointing left": "hand pointing left",
    "backhand index pointing down": "hand pointing down",
    "index pointing up": "hand pointing up",
    "index pointing at the viewer": "hand pointing at the viewer",
    "palms up together": "hands with palms up together",
    "nail polish": "nail polish bottle",
    "ok hand": "ok hand sign",
    "person: blond hair": "person with blond hair",
    "mage": "wizard",
    "horse racing": "horse and jockey racing",
    "lady beetle": "ladybug",
    "automobile": "car",
    "oncoming automobile": "oncoming car",
    "articulated lorry": "semi truck",
    "poultry leg": "chicken leg",
    "health worker": "doctor",
    "fly": "housefly",
    "foggy": "foggy bridge",
    "bank": "bank building",
    "construction": "construction barrier",
    "seat": "airplane seat",
    "globe showing europe-africa": "planet earth",
    "magnifying glass tilted left": "magnifying glass",
    "three o'clock": "clock",
    "mantelpiece clock": "mantel clock",
    "hourglass done": "hourglass",
    "high voltage": "lightning bolt",
    "pool 8 ball": "billiard ball",
    "mate": "mate drink",
    "mirror ball": "disco ball",
    "tennis": "tennis racket and ball",
    "bowling": "bowling ball and pins",
    "badminton": "badminton racket and shuttlecock",
    "cricket game": "cricket bat and ball",
    "field hockey": "field hockey stick and ball",
    "ice hockey": "ice hockey stick and puck",
    "lacrosse": "lacrosse stick and ball",
    "ping pong": "ping pong paddle and ball",
    "performing arts": "theater masks",
    "speaker high volume": "loud speaker",
    "headphone": "pair of headphones",
    "pouring liquid": "glass pouring liquid",
    "chart increasing": "increasing chart",
    "chart decreasing": "decreasing chart",
    "low battery": "nearly empty battery",
    "page facing up": "page of paper",
    "locked": "closed padlock",
    "unlocked": "open padlock",
    "locked with key": "padlock with key",
    "link": "chain link",
    "label": "price tag",
    "cooking": "egg in a frying pan",
    "steaming bowl": "steaming bowl of noodles",
    "leafy green": "leafy green vegetable",
    "building construction": "building under construction",
    "people with bunny ears": "two people with bunny ears",
    "people wrestling": "two people wrestling",
    "people hugging": "two people hugging",
    "people holding hands": "two people holding hands",
    "billed cap": "baseball cap",
}

# Words of one meaning, which count as one when two concepts are compared; the first is its name.
# Those before the slash also stand for each other in phrasings (the others are other word forms).
SYNONYMS = """
cat kitty kitten feline | dog puppy doggy | rabbit bunny hare | horse pony | pig piggy hog | cow /
cattle | monkey ape / | bee bumblebee / honeybee | ladybug ladybird | cockroach roach | bug insect
| hippopotamus hippo | rhinoceros rhino | turtle tortoise | crocodile alligator | snake serpent |
rooster cockerel | mouse / mice | wolf / wolves | goose / geese | smiling grinning happy cheerful
joyful / smile grin smiley beaming | sad unhappy gloomy | crying weeping sobbing / cry | angry
furious mad / pouting anger | kissing smooching / kiss smooch | love / loving romance | tired
weary exhausted | sleeping snoozing / sleep | sick ill unwell | surprised astonished amazed /
shocked | scared fearful frightened / fear afraid | thinking pondering | confused puzzled |
winking / wink | worried anxious nervous | disguised / disguise | drooling / drool | yawning /
yawn | car automobile auto | airplane plane aeroplane / jet | doughnut donut | hamburger burger |
television tv telly | bicycle bike | motorcycle motorbike | ship boat | motorway highway | taxi
cab | truck lorry / | metro subway underground | police / cop cops | rocket spaceship | house home
| castle fortress | mountain / mountains | stone rock boulder | volcano / eruption | beach seaside
| tornado twister whirlwind | sun / sunny sunshine | snow / snowy | rain / rainy | moon / lunar |
star / stars starry | earth / world globe | telephone phone | cellphone smartphone | sunglasses
shades | glasses spectacles eyeglasses | gift present | wastebasket bin / trash garbage waste |
toilet lavatory | couch sofa | bathtub tub | broom / brush | camera / photo | movie / film cinema
| candy / sweets | doctor physician / health | cook chef | teacher professor | wizard sorcerer
mage | ghost phantom / spooky | robot android | alien extraterrestrial | devil demon imp | poop
poo | party / celebration | christmas xmas | violin fiddle | microphone mic | music / musical |
hammer mallet | wrench spanner | axe hatchet | padlock lock / locked | key / keys | shoe / shoes |
boot / boots | cap / caps | jeans denims / denim | trousers pants | necktie tie | coat overcoat /
jacket | dress gown | backpack rucksack | socks stockings | briefs underpants / underwear | cookie
biscuit | pie tart | pancakes hotcakes | shrimp prawn | soup broth | corn maize | eggplant
aubergine | soccer / football | cup mug | beer ale | coffee espresso | baby infant | woman lady |
man guy | boy lad | girl lass | old elderly / older aged | tooth / teeth dental | heart / hearts |
flower / flowers | blossom bloom | tree / trees | leaf / leaves | mushroom toadstool | small
little tiny | big large | gem jewel / diamond jewelry | trophy prize | envelope / letter | package
parcel | postbox mailbox | luggage baggage | elevator lift | flashlight torch | faucet tap | crown
/ royal | firefighter fireman | wood / timber | spaghetti pasta | noodles / noodle ramen | magic /
magical | coffin casket | headstone gravestone tombstone | seedling sprout sapling | yarn wool |
necklace / beads | dagger knife / | racket racquet | artist painter | singer vocalist | vampire /
dracula | scientist chemist | astronaut cosmonaut spaceman | judge magistrate | farmer rancher |
detective sleuth | student pupil | pilot aviator
"""

# Neither "a rice" nor "a scissors": no article (plurals are found by their ending).
NO_ARTICLE = _names("""
santa claus; mrs claus; tokyo tower; mount fuji; broccoli; garlic; bread; bacon; cooked rice;
curry rice; sushi; spaghetti; popcorn; butter; salt; canned food; ice; ice cream; soft ice cream;
shaved ice; custard; camping; coral; wood; fog; yarn; thread; soap; dna; sake; oden; dango;
bubble tea; meat on bone; fondue; zzz; fire; mate drink; planet earth; luggage; ginger root;
two people with bunny ears; two people wrestling; two people hugging; two people holding hands;
money with wings
""")
THE = {"statue of liberty", "milky way", "kaaba"}
SINGULAR_S = _words(
    "cactus octopus bus abacus hibiscus lotus minibus trolleybus hippopotamus rhinoceros"
)
# Labels in which a word by itself means something else.
FIXED = _names("hot dog; moon cake; clinking glasses; old key; lab coat; cup with straw")

# Slang, and words that say nothing of what is seen.
IGNORED = _words("""
143 ily yolo omg whatever smh bae bff bro slay swag lit litaf af tbt no not yes you me what
way why lol lmao rofl roflmao haha hahaha hehe xoxo fleek legit totally awk jel dunno idk wtv
boom epic ugh uhh oh ok okay homie adorbs bday bestie dope fosho rad sure got gotcha bet do so
the and with of on in at to a an for over up down out this that it i'm it's good great nice
awesome cool special like keep know here again pick who maybe am day night morning zodiac
emotion comic meh whoa woah wow geez jeez eek yikes yay aww hmm hm um ew sexy virgin ass feels
believe call come job well done face animal animals food place clothing clothes tool thing object
symbol sign s emoji one two three four five six seven eight nine ten twelve thirty
""")

# Plain things that do not look alike: what the embedded model is trained on last and longest.
CORE = """
grinning face, winking face, kissing face, thinking face, neutral face, sleeping face, crying
face, angry face, smiling face with heart-eyes, smiling face with sunglasses, face with tears of
joy, nerd face, cold face, frowning face, face screaming in fear, partying face, cowboy hat
face, clown face, zany face, grinning cat, smiling cat with heart-eyes, skull, ghost, alien,
robot, pile of poop, red heart, broken heart, blue heart, green heart, yellow heart, purple
heart, thumbs up, waving hand, eyes, brain, tooth, bone, mouth, ear, nose, dog face, dog, cat,
fox, wolf, lion, tiger, horse face, unicorn, zebra, cow face, pig face, mouse face, hamster,
rabbit face, bear, koala, panda, monkey face, gorilla, elephant, giraffe, camel, frog, turtle,
snake, dragon face, whale, dolphin, fish, shark, octopus, crab, lobster, snail, butterfly,
honeybee, ladybug, spider, owl, penguin, eagle, duck, flamingo, peacock, parrot, baby chick,
chicken, bat, kangaroo, hedgehog, t-rex, rose, sunflower, tulip, cactus, palm tree, deciduous
tree, christmas tree, mushroom, four leaf clover, maple leaf, potted plant, grapes, watermelon,
lemon, banana, pineapple, red apple, green apple, pear, peach, cherries, strawberry, tomato,
coconut, avocado, eggplant, carrot, broccoli, ear of corn, hot pepper, bread, croissant,
pretzel, pancakes, waffle, cheese wedge, hamburger, french fries, pizza, hot dog, taco, egg,
popcorn, sushi, ice cream, soft ice cream, doughnut, cookie, birthday cake, cupcake, candy,
lollipop, honey pot, hot beverage, beer mug, wine glass, glass of milk, baby bottle, house,
japanese castle, tent, mountain, volcano, rainbow, sun, full moon, crescent moon, star, cloud,
snowflake, snowman, fire, droplet, planet earth, ringed planet, umbrella, lightning bolt,
tornado, car, bus, taxi, police car, ambulance, fire engine, bicycle, motorcycle, train,
locomotive, tractor, airplane, helicopter, rocket, flying saucer, sailboat, ship, anchor, stop
sign, vertical traffic light, soccer ball, basketball, american football, tennis racket and
ball, trophy, bullseye, kite, balloon, wrapped gift, teddy bear, game die, puzzle piece, crystal
ball, magic wand, video game, boxing glove, guitar, violin, trumpet, drum, saxophone, musical
note, studio microphone, pair of headphones, radio, crown, top hat, glasses, sunglasses,
t-shirt, dress, socks, scarf, backpack, running shoe, high-heeled shoe, necktie, ring, gem
stone, lipstick, bell, key, hammer, axe, wrench, scissors, pencil, paintbrush, light bulb,
candle, camera, television, laptop, mobile phone, magnet, telescope, microscope, syringe, pill,
bomb, shield, dagger, money bag, coin, envelope, package, green book, open book, magnifying
glass, closed padlock, hourglass, alarm clock, watch, chair, bed, toilet, bathtub, door, bucket,
broom, gear
"""
CORE = {" ".join(label.split()) for label in CORE.split(",")}
