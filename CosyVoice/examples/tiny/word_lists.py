"""The words of the tiny corpus, by what they may stand beside. `grammar.py` says in which order they come.

A noun is written `singular/plural`, with one of the two left out where it would only make the vocabulary larger. A verb
is written as its base form; the forms that no rule gives are in `IRREGULAR_VERBS`.
"""

from __future__ import annotations

NOUNS = {
    "person": """teacher/teachers doctor/doctors nurse/nurses farmer/farmers baker captain soldier/soldiers judge
        pilot boy/boys girl/girls brother/brothers sister/sisters uncle aunt mother father son/sons
        daughter/daughters neighbor/neighbors friend/friends student/students artist/artists painter writer/writers
        singer dancer driver/drivers sailor/sailors lawyer officer/officers king prince guard guest/guests stranger
        manager worker/workers cook player/players leader/leaders owner scientist/scientists thief/thieves
        woman/women man/men baby/babies butcher engineer grandmother husband wife lady/ladies child/children /people
        choir""",
    "animal": """dog/dogs cat/cats horse/horses cow/cows pig goat/goats fox wolf/wolves bear/bears lion tiger
        rabbit/rabbits mouse/mice bird/birds duck/ducks goose/geese eagle owl heron whale/whales snake turtle
        elephant puppy kitten/kittens""",
    "thing": """book/books letter/letters box/boxes coin/coins watch/watches kettle spoon/spoons knife/knives
        plate/plates cup/cups bottle/bottles glass/glasses jar vase lamp/lamps candle/candles clock/clocks
        bell/bells key/keys nail rope/ropes chain bag/bags coat/coats hat/hats shirt/shirts shoe/shoes glove/gloves
        dress ring/rings button/buttons pencil/pencils picture/pictures map/maps camera phone radio computer
        machine/machines engine tool/tools toy/toys ball drum/drums violin guitar piano flag/flags ticket/tickets
        train/trains newspaper notebook mirror blanket/blankets pillow towel carpet chair/chairs table/tables desk
        bed/beds shelf/shelves drawer bicycle wheel/wheels cart boat/boats car/cars truck bus umbrella package
        treasure/treasures jewel/jewels crown sword stone/stones brick/bricks board stick/sticks wire rose/roses
        flower/flowers piece/pieces""",
    "food": """loaf apple/apples pear/pears orange/oranges cherry/cherries grape/grapes lemon banana potato/potatoes
        tomato onion/onions carrot bean/beans egg/eggs cake/cakes cookie/cookies pie sandwich/sandwiches peach salad
        mushroom/mushrooms""",
    "edible": """bread cheese soup butter honey sugar salt pepper rice meat chicken milk coffee tea juice syrup
        water chocolate cream""",
    "stuff": "clay gold iron wood oil paper leather wool soap",
    "place": """kitchen garden/gardens harbour bridge/bridges river/rivers valley village/villages house/houses
        school/schools market museum/museums library hospital station airport hotel/hotels restaurant office factory
        farm/farms field/fields forest/forests mountain/mountains hill/hills beach/beaches island/islands lake pond
        road/roads street/streets square park tower/towers castle church prison shop/shops store bank barn hall
        room/rooms roof/roofs wall/walls gate/gates fence door/doors window/windows chimney path/paths tunnel
        cave/caves desert coast shore ocean city town/towns capital border university court camp cottage well
        tree/trees rock/rocks corner""",
    "weather": """rain snow wind storm thunder cloud sun moon sky smoke fog fire light shadow noise music
        smell shade voice""",
    "matter": """idea/ideas plan/plans story/stories question/questions answer/answers reason/reasons
        problem/problems lesson/lessons rule/rules truth secret/secrets promise/promises mistake/mistakes
        choice/choices decision report message/messages word/words name/names number/numbers price/prices journey
        trip voyage adventure game/games match race prize/prizes holiday meeting/meetings party/parties wedding
        concert festival job task/tasks system experiment/experiments language/languages poem/poems joke/jokes
        song/songs television vision""",
    "material": "wooden silver golden glass stone clay iron leather oak paper",
}

VERBS = {
    "handle": """take bring carry hold drop find lose buy sell steal borrow keep hide move push pull throw repair
        clean wash paint open close cover measure choose collect count draw use need show remove share see order
        return receive leave""",
    "meet": """help meet thank call visit follow watch warn teach trust invite join surprise protect know miss guide
        feed answer""",
    "go": "walk run go come travel march ride drive swim climb jump hurry sail move",
    "stay": """sleep relax rest wait stand sit stay live breathe work play sing laugh smile cry shout dream fall
        dance arrive appear disappear""",
    "say": """think know believe hope say hear explain agree notice promise remember forget understand feel learn
        discover decide""",
    "solve": """explain discuss solve finish start begin change consider study check prove improve win write read
        avoid mention choose""",
    "eat": "eat drink cook cut taste serve mix share smell buy",
    "blow": "shine rise appear stop spread return begin grow",
}

IRREGULAR_VERBS = {  # past and past participle; where one stands alone it is both
    "take": "took taken",
    "bring": "brought",
    "hold": "held",
    "find": "found",
    "lose": "lost",
    "leave": "left",
    "buy": "bought",
    "sell": "sold",
    "steal": "stole stolen",
    "keep": "kept",
    "hide": "hid hidden",
    "throw": "threw thrown",
    "choose": "chose chosen",
    "draw": "drew drawn",
    "show": "showed shown",
    "see": "saw seen",
    "meet": "met",
    "teach": "taught",
    "forgive": "forgave forgiven",
    "know": "knew known",
    "feed": "fed",
    "run": "ran run",
    "go": "went gone",
    "come": "came come",
    "ride": "rode ridden",
    "drive": "drove driven",
    "swim": "swam swum",
    "sleep": "slept",
    "stand": "stood",
    "sit": "sat",
    "sing": "sang sung",
    "fall": "fell fallen",
    "think": "thought",
    "say": "said",
    "hear": "heard",
    "forget": "forgot forgotten",
    "understand": "understood",
    "feel": "felt",
    "begin": "began begun",
    "win": "won",
    "write": "wrote written",
    "read": "read",
    "eat": "ate eaten",
    "drink": "drank drunk",
    "cut": "cut",
    "shine": "shone",
    "rise": "rose risen",
    "spread": "spread",
    "grow": "grew grown",
}
DOUBLED_CONSONANT = "drop stop swim sit forget begin win cut run plan".split()  # before -ed and -ing

WORDS = {
    "person_adjective": """young old tall kind honest clever brave lazy busy gentle cheerful nervous proud wise
        famous lonely tired hungry happy angry curious friendly foolish loyal strong shy patient calm serious royal
        little""",
    "animal_adjective": "wild brown white black grey fat quick tame hungry tiny young lazy gentle noisy",
    "thing_adjective": """old new heavy light small large broken empty blue red green yellow pink purple orange
        azure brown bright shiny dirty clean cheap expensive precious ugly beautiful round narrow strange simple
        useful plain thick thin smooth sharp broken huge little tight full modern ancient""",
    "food_adjective": "fresh ripe sweet sour bitter hot cold warm frozen soft raw spicy",
    "place_adjective": """quiet busy dark wide narrow empty muddy near distant huge ancient modern peaceful crowded
        sunny frozen royal northern southern little local public private deep low broad lovely""",
    "weather_adjective": "heavy cold warm strange soft gentle loud pale sudden thick bright terrible pleasant vivid",
    "matter_adjective": """easy difficult important strange simple clever funny sad short long boring exciting
        unusual usual secret serious perfect terrible wonderful final similar possible special popular wrong true
        favorite complete""",
    "larger": "larger smaller older taller heavier cheaper better worse faster slower quieter",
    "lowest": "lowest largest smallest oldest youngest best worst finest nearest longest shortest highest",
    "manner": """slowly quickly quietly loudly carefully gently happily sadly angrily calmly proudly easily bravely
        politely secretly suddenly together alone again twice""",
    "often": "usually often always never sometimes rarely still once just already ",
    "very": "very quite rather too really so almost",
    "number": """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety several many some""",
    "hour": "one two three four five six seven eight nine ten eleven twelve",
    "round_number": "hundred thousand million dozen",
    "ordinal": "first second third fourth fifth sixth seventh eighth ninth tenth last next other same",
    "name": """Anna Peter Mary John Susan David Laura George Helen Thomas Julia Robert Alice Henry Emma Oliver
        Sophia Charles Joyce Roy Daniel Ruth Edward Grace Hugh Jack Kate Martin Victor Zoe""",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April May June July August September October November December",
    "season": "spring summer autumn winter",
    "morning": "morning evening afternoon night noon week weekend month year",
    "whose": "the my your his her our their this that",
    "whose_many": "the my your his her our their these those",
    "he": "he she",
    "they": "they we you I",
    "him": "him her them us me you",
    "someone": "nobody everybody somebody everyone someone",
    "beside": "beside near behind above below under across around beyond against outside",
    "in": "in inside at near",
    "to": "to into toward through across over past along from",
    "before": "before after because while until when since although if unless",
    "will": "will can could should would may might must",
    "why": "why when how where",
    "body": "hands feet face eyes hair arms head back ears mouth teeth",
}
