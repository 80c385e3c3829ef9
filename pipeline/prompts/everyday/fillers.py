"""Lists what everyday requests are about; each list is of one grammatical kind, which its comment names."""

# noun phrases: "how ... works", "explain ..."
SUBJECTS = (
    "photosynthesis", "compound interest", "the water cycle", "inflation", "a rainbow", "the human heart",
    "a black hole", "recycling", "the immune system", "a solar panel", "supply and demand", "gravity",
    "a search engine", "the moon's phases", "an earthquake", "plate tectonics", "a vaccine", "sleep", "memory",
    "the greenhouse effect", "a credit score", "democracy", "the stock market", "evolution", "natural selection",
    "an electric car", "a microwave oven", "a refrigerator", "the internet", "encryption", "a password manager",
    "machine learning", "a neural network", "Wi-Fi", "GPS", "a barcode", "3D printing", "digestion", "a volcano",
    "the speed of light", "atoms", "chemical bonds", "acids and bases", "DNA", "a virus", "bacteria", "fermentation",
    "bread rising", "a hybrid engine", "wind power", "nuclear energy", "a lever", "friction", "magnetism",
    "electricity", "a battery", "sound waves", "an echo", "colour blindness", "a lens", "a telescope", "a tornado",
    "ocean tides", "coral reefs", "pollination", "hibernation", "bird migration", "camouflage", "a food chain",
    "soil erosion", "composting", "a mortgage", "income tax", "insurance", "a budget", "a pension", "bankruptcy",
    "the United Nations", "a constitution", "a jury", "copyright", "the Renaissance", "the Industrial Revolution",
    "the Silk Road", "the Roman Empire", "hieroglyphs", "a printing press", "a haiku", "a metaphor", "irony",
    "jazz", "a symphony", "perspective in drawing", "the rule of thirds", "body language", "procrastination",
    "the placebo effect", "stress", "habit formation", "peer pressure", "empathy", "critical thinking", "a hypothesis",
    "probability", "prime numbers", "percentages", "the Pythagorean theorem", "zero", "binary numbers", "a database",
    "a compiler", "version control", "cloud computing", "an algorithm", "recursion", "open source software",
    "jet lag", "dehydration", "a fever", "blood pressure", "vitamin D", "protein", "caffeine", "allergies",
)  # fmt: skip
AUDIENCES = (
    "a ten-year-old", "a curious teenager", "my grandmother", "a complete beginner", "a busy manager",
    "someone who hates science", "a new student", "a friend over dinner", "a class of young children",
    "a person who has never heard of it", "an exchange student", "my neighbour", "a sceptic",
)  # fmt: skip

# gerunds: "tips for ...", "start ..."
ACTIVITIES = (
    "growing tomatoes", "learning the guitar", "running a first marathon", "saving money", "waking up early",
    "baking bread", "studying for exams", "training a puppy", "moving to a new city", "writing a diary",
    "cleaning a small kitchen", "packing a suitcase", "speaking in public", "learning Spanish", "reading more books",
    "keeping houseplants alive", "cooking for one", "hosting a dinner party", "camping in the rain",
    "cycling to work", "drawing portraits", "taking better photographs", "playing chess", "knitting a scarf",
    "fixing a leaking tap", "painting a bedroom", "choosing a laptop", "buying a used car", "renting a flat",
    "working from home", "leading a meeting", "giving feedback", "asking for a raise", "preparing for an interview",
    "making new friends", "staying calm under pressure", "meditating", "swimming for fitness", "lifting weights",
    "hiking in the mountains", "fishing on a lake", "watching birds", "keeping bees", "raising chickens",
    "making cheese", "brewing coffee", "decorating a cake", "sewing on a button", "organising a bookshelf",
    "sorting old photos", "planning a wedding", "travelling with children", "flying for the first time",
    "driving on snow", "growing herbs on a balcony", "feeding a cat", "walking a nervous dog", "teaching maths",
    "learning to type", "writing a novel", "composing a song", "singing in a choir", "acting in a school play",
    "volunteering at a shelter", "running a small shop", "selling old clothes", "starting a podcast",
    "building a treehouse", "repairing a bicycle", "sleeping better", "eating less sugar", "drinking more water",
    "quitting a bad habit", "managing a team", "remembering names", "keeping a budget", "learning to swim",
)  # fmt: skip

# things of one kind, to be set side by side
RIVALS = (
    ("tea", "coffee", "hot chocolate", "orange juice", "mineral water"),
    ("cats", "dogs", "rabbits", "parrots", "goldfish", "hamsters"),
    ("trains", "buses", "cars", "bicycles", "ferries", "aeroplanes"),
    ("Paris", "London", "Rome", "Tokyo", "New York", "Cairo", "Sydney"),
    ("summer", "winter", "spring", "autumn"),
    ("football", "tennis", "basketball", "swimming", "chess", "volleyball"),
    ("Python", "Java", "JavaScript", "C++", "Rust", "Go"),
    ("pizza", "sushi", "tacos", "curry", "burgers", "salad"),
    ("the city", "the countryside", "the seaside", "the mountains"),
    ("books", "films", "radio plays", "video games", "theatre"),
    ("solar power", "wind power", "nuclear power", "coal", "hydropower"),
    ("the piano", "the violin", "the drums", "the flute", "the guitar"),
    ("renting a home", "buying a home", "living with parents", "sharing a flat"),
    ("online classes", "evening classes", "private lessons", "self-study"),
    ("wool", "cotton", "silk", "polyester", "linen"),
    ("butter", "olive oil", "margarine", "coconut oil"),
    ("lions", "tigers", "wolves", "bears", "leopards"),
    ("Mars", "Venus", "Jupiter", "Saturn", "Mercury"),
    ("capitalism", "socialism", "feudalism", "mercantilism"),
    ("email", "telephone calls", "letters", "text messages", "video calls"),
    ("rice", "pasta", "potatoes", "bread", "couscous"),
    ("cash", "credit cards", "cheques", "bank transfers"),
    ("a savings account", "government bonds", "shares", "real estate", "gold"),
)  # fmt: skip

# people and places for stories, letters and short texts
NAMES = (
    "Amara", "Bruno", "Chen", "Dalia", "Elias", "Farah", "Gustav", "Hana", "Ivo", "Jasmin", "Kofi", "Lucia", "Marek",
    "Nadia", "Oscar", "Priya", "Quentin", "Rosa", "Samir", "Tilda", "Umar", "Vera", "Walter", "Ximena", "Yuki", "Zara",
)  # fmt: skip
CHARACTERS = (
    "a lonely lighthouse keeper", "a clumsy wizard", "a retired teacher", "a brave mouse", "a robot that paints",
    "two sisters", "a taxi driver", "a young inventor", "an old fisherman", "a talking tree", "a shy baker",
    "a lost astronaut", "a detective who hates coffee", "a princess who wants to be a farmer", "a street musician",
    "a forgetful ghost", "a librarian with a secret", "a dragon afraid of fire", "a boy with a paper boat",
    "a nurse on the night shift", "a cat that can read", "twin brothers", "a stubborn gardener", "a travelling clown",
    "a girl who collects sounds", "a king without a crown", "a postman in the snow", "a whale that sings off key",
    "a mathematician in love", "a watchmaker", "the last elephant", "a spy who is too polite", "a tired superhero",
)  # fmt: skip
PLACES = (
    "in a city under the sea", "on a small island", "in a snowy village", "at a busy railway station",
    "in an empty theatre", "on the moon", "in a desert town", "in a forest at night", "at a county fair",
    "in an old library", "on a slow ship", "in a bakery at dawn", "in a hospital garden", "at the edge of a cliff",
    "in a museum after closing time", "on a farm in spring", "in a crowded market", "in a house without doors",
    "at a school reunion", "in a tunnel below the river", "on a train that never stops", "in a valley of windmills",
    "in a shop for broken things", "at the bottom of a well", "in a town where it always rains",
)  # fmt: skip
TURNS = (
    "finds a letter that was never sent", "loses something precious", "makes an unlikely friend",
    "has to tell the truth at last", "learns to forgive", "hears a strange noise", "gets a second chance",
    "wins a contest by accident", "discovers a hidden door", "must choose between two homes",
    "teaches a stranger to dance", "breaks a promise", "meets an old rival", "saves a neighbour", "wakes up too late",
    "misses the last bus", "opens a box of old photographs", "is given a map", "hides from the rain",
    "changes the weather", "plants a tree", "repairs a clock", "follows a trail of footprints",
)  # fmt: skip
MOODS = ("funny", "sad", "hopeful", "mysterious", "gentle", "scary", "surprising", "dreamy", "cheerful", "calm")

# letters: to whom, and why ("to ask ...")
RECIPIENTS = (
    "my landlord", "my boss", "a customer", "my old teacher", "a colleague", "the school", "my neighbours",
    "a travel agency", "the town council", "a hotel", "my aunt", "a new employee", "the electricity company",
    "my doctor's office", "a job applicant", "the library", "my football team", "a supplier", "my professor",
    "an online shop", "the editor of a newspaper", "my cousin", "a charity", "my bank", "the parents of my class",
)  # fmt: skip
PURPOSES = (
    "to ask for a week of leave", "to complain about noise at night", "to thank them for their help",
    "to apologise for a late reply", "to cancel a booking", "to move a meeting to Thursday",
    "to ask about opening hours", "to report a broken heater", "to invite them to a barbecue",
    "to ask for a refund", "to recommend a friend", "to explain a delay", "to ask for more time",
    "to congratulate them", "to announce a new price", "to ask for advice", "to offer help with a move",
    "to request a copy of a bill", "to say that I am ill today", "to confirm an appointment",
    "to suggest a better plan", "to introduce myself", "to say goodbye before I leave", "to ask for a reference",
    "to remind them of a deadline", "to order fifty chairs", "to share good news", "to ask for a quieter room",
    "to return a damaged lamp", "to organise a collection for a gift",
)  # fmt: skip
TONES = ("polite", "friendly", "formal", "short", "warm", "firm", "cheerful", "grateful", "professional", "direct")

# what a function should do
CODE_TASKS = (
    "reverses a string", "checks whether a number is prime", "counts the vowels in a text", "sorts a list of names",
    "finds the largest number in a list", "computes the factorial of a number", "converts Celsius to Fahrenheit",
    "removes duplicates from a list", "checks whether a word is a palindrome", "adds all even numbers of a list",
    "merges two sorted lists", "counts how often each word appears", "reads a file and prints its lines",
    "generates a random password", "computes the average of a list", "finds the longest word in a sentence",
    "prints the first n Fibonacci numbers", "checks whether two words are anagrams", "flattens a nested list",
    "rounds a price to two decimals", "converts a number to binary", "validates an email address",
    "swaps two variables", "finds the second smallest number", "capitalises every word", "computes compound interest",
    "groups people by age", "draws a triangle of stars", "multiplies two matrices", "rotates a list by k places",
    "splits a list into chunks", "computes the distance between two points", "counts down from ten",
    "finds all divisors of a number", "turns a dictionary into a list of pairs", "removes punctuation from a text",
    "checks for balanced brackets", "computes the greatest common divisor", "finds the missing number in a range",
    "simulates rolling two dice", "formats a date", "computes the median", "filters out negative numbers",
    "searches a sorted list", "checks whether a year is a leap year", "computes the sum of digits",
    "joins a list of words with commas", "prints a multiplication table", "counts the lines of a file",
    "finds common elements of two lists", "replaces spaces with dashes", "shuffles a deck of cards",
)  # fmt: skip
LANGUAGES_OF_CODE = ("Python", "Python", "Python", "JavaScript", "Java", "C", "Ruby", "Go")

# situations: "I ..."
SITUATIONS = (
    "cannot fall asleep before two in the morning", "forgot my best friend's birthday",
    "keep losing my keys", "want to change jobs but I am afraid", "have too many clothes and no space",
    "spend three hours a day on my phone", "am nervous about meeting my partner's parents",
    "burn everything I cook", "never finish the books I start", "have a neighbour who plays loud music",
    "want to get fit but hate gyms", "am moving abroad next month", "have only ten euros until Friday",
    "got a bad mark in chemistry", "have to give a speech at a wedding", "want to learn to say no",
    "feel tired every afternoon", "have a colleague who takes credit for my work", "am always late",
    "want to eat healthier on a small budget", "am shy at parties", "have a test tomorrow and have not studied",
    "lent money to a friend who does not pay it back", "cannot decide what to study", "miss my family",
    "want to adopt a dog but live in a small flat", "have a cold and an important meeting",
    "argue with my brother all the time", "want to write a book but do not know how to begin",
    "broke my neighbour's window", "have too much work and too little time", "feel lonely in a new town",
    "want to stop biting my nails", "am afraid of flying", "have a child who refuses vegetables",
    "want to save for a bicycle", "have a laptop that is very slow", "got lost on a hike last week",
    "am planning a surprise party", "want to use less plastic", "have to choose between two job offers",
    "cannot remember people's names", "want to be a better listener", "have a plant with yellow leaves",
    "received a gift that I do not like", "am starting at a new school", "want to learn a language in a year",
    "have back pain from sitting", "find it hard to apologise", "want to spend less on food",
)  # fmt: skip

WORDS = (
    "resilient", "ambiguous", "meticulous", "nostalgia", "frugal", "candid", "serendipity", "obsolete", "diligent",
    "eloquent", "tedious", "benevolent", "reluctant", "vivid", "plausible", "trivial", "abundant", "brittle",
    "cautious", "dormant", "elusive", "fluctuate", "gregarious", "hinder", "impartial", "jovial", "keen", "lucid",
    "mundane", "novice", "oblivious", "persistent", "quaint", "robust", "sceptical", "tangible", "unanimous",
    "versatile", "wary", "yield", "zealous", "arbitrary", "coherent", "deter", "empirical", "feasible", "generic",
    "hypocrite", "imminent", "juxtapose", "linger", "mitigate", "notorious", "opaque", "prudent", "redundant",
    "subtle", "thrive", "vulnerable",
)  # fmt: skip
DISHES = (
    "vegetable soup", "pancakes", "a lentil curry", "an apple pie", "fried rice", "a tomato salad", "banana bread",
    "mushroom risotto", "chicken stew", "baked potatoes", "a spinach omelette", "garlic bread", "a fruit smoothie",
    "roasted carrots", "chocolate cookies", "a bean burrito", "fish cakes", "onion soup", "a cheese toast",
    "pumpkin soup", "homemade pizza", "a pasta bake", "stuffed peppers", "a noodle salad", "oat porridge",
    "lemonade", "a carrot cake", "hummus", "potato salad", "cinnamon rolls", "a vegetable lasagne", "shepherd's pie",
)  # fmt: skip
LIMITS = (
    "without eggs", "in under twenty minutes", "for four people", "on a tight budget", "without an oven",
    "for a picnic", "with only five ingredients", "for children", "without dairy", "in a single pot", "for beginners",
    "for a cold evening", "that keeps for three days", "with leftovers", "without meat", "for a birthday",
)  # fmt: skip
PRODUCTS = (
    "a solar-powered lamp", "a folding bicycle", "a waterproof notebook", "a silent alarm clock", "a reusable cup",
    "a backpack for cameras", "a toy robot", "handmade soap", "a garden swing", "noise-cancelling headphones",
    "a raincoat for dogs", "a bamboo toothbrush", "a portable stove", "a wooden puzzle", "a mountain honey",
    "a language app", "a heated blanket", "a bread knife", "running shoes", "a bird feeder", "a desk that moves up",
    "an online course in drawing", "a travel pillow", "a vegetable box", "a fountain pen", "a smart thermostat",
)  # fmt: skip
DEBATES = (
    "school uniforms", "homework", "a four-day work week", "electric scooters", "zoos", "free public transport",
    "mobile phones in class", "working at night", "fast fashion", "space travel", "online shopping", "tourism",
    "video games for children", "remote work", "banning cars from city centres", "artificial intelligence in schools",
    "a universal basic income", "keeping exotic pets", "early retirement", "living alone", "social media",
    "eating meat", "daylight saving time", "tipping in restaurants", "paper books", "large families", "gap years",
)  # fmt: skip
COUNTRIES = (
    "Norway", "Kenya", "Peru", "Japan", "Canada", "Morocco", "India", "Portugal", "Vietnam", "Chile", "Iceland",
    "Egypt", "Greece", "Mexico", "Poland", "Thailand", "Ghana", "New Zealand", "Turkey", "Brazil", "Ireland", "Nepal",
    "South Korea", "Switzerland", "Argentina", "Finland", "Indonesia", "Cuba", "Austria", "Ethiopia",
)  # fmt: skip
FIGURES = (
    "Marie Curie", "Isaac Newton", "Cleopatra", "Leonardo da Vinci", "Nelson Mandela", "Ada Lovelace", "Mozart",
    "Albert Einstein", "Frida Kahlo", "William Shakespeare", "Mahatma Gandhi", "Charles Darwin", "Florence Nightingale",
    "Galileo Galilei", "Rosa Parks", "Napoleon", "Vincent van Gogh", "Joan of Arc", "Marco Polo", "Jane Austen",
    "Alan Turing", "Amelia Earhart", "Confucius", "Beethoven", "Martin Luther King", "Socrates", "Nikola Tesla",
)  # fmt: skip
TONGUES = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch")
GROUPS = (
    "a family with two small children", "a couple in their sixties", "three students", "someone who travels alone",
    "a group of colleagues", "a person in a wheelchair", "two friends who love food", "a school class",
    "a history lover", "somebody who hates crowds", "a photographer", "grandparents and their grandson",
)  # fmt: skip
GOALS = (
    "wants to run five kilometres", "wants to pass a maths exam", "has to finish a report", "is learning the piano",
    "wants more time with the children", "is preparing for a move", "wants to write every day",
    "needs to practise English", "wants to eat better", "is looking for a job", "works at night",
    "looks after an elderly parent", "wants to read twelve books this year", "is training a dog",
)  # fmt: skip
