//! Arithmetic over named measurements: `0.5 * progress + solved * shortest / max(steps, shortest)`.
//!
//! Every intermediate value must be finite: a division by zero inside `min(1, x / 0)` is an error and not a 1. What is
//! not 0 counts as true. `winnow` does the parsing; this module says what the words mean. It knows measurements by name
//! and no task.

use winnow::Parser as _;
use winnow::ascii::{float, multispace0};
use winnow::combinator::{
    Infix, Prefix, alt, delimited, dispatch, empty, expression, fail, not, opt, peek, preceded, separated, terminated,
};
use winnow::error::ContextError;
use winnow::token::{any, one_of, take_while};

use crate::rewards::RewardError;

/// What an expression may be made of, for hints.
pub const GRAMMAR: &str = "an expression has numbers, measurements, `+ - * / ^`, `< <= > >= == !=`, `and`, `or` (1 or \
     0), parentheses, and `min(a, b)`, `max(a, b)`, `clamp(a, low, high)`, `abs(a)`, `sqrt(a)`, `exp(a)`, `ln(a)`, \
     `floor(a)`, `ceil(a)`";

/// Characters in an expression, at most. This and [`DEEPEST`] bound how deep the parser recurses.
const LONGEST: usize = 500;
/// Parentheses within each other, at most.
const DEEPEST: usize = 24;

type Result<T> = winnow::Result<T, ContextError>;

/// A compiled expression.
#[derive(Clone, Debug)]
pub struct Expression {
    text: String,
    root: Node,
    names: Vec<String>,
}

#[derive(Clone, Debug)]
enum Node {
    Number(f64),
    Measurement(String),
    Unary(fn(f64) -> f64, Box<Node>),
    Binary(fn(f64, f64) -> f64, Box<Node>, Box<Node>),
}

impl Expression {
    /// Reads an expression; the error says where it stops making sense.
    pub fn compile(text: &str) -> std::result::Result<Self, String> {
        if text.trim().is_empty() {
            return Err("the expression is empty".to_owned());
        }
        if text.len() > LONGEST {
            return Err(format!("the expression has {} characters, more than {LONGEST}", text.len()));
        }
        let mut depth = 0usize;
        for character in text.chars() {
            depth = match character {
                '(' => depth + 1,
                ')' => depth.saturating_sub(1),
                _ => depth,
            };
            if depth > DEEPEST {
                return Err(format!("parentheses stand more than {DEEPEST} deep"));
            }
        }
        let root = delimited(multispace0, disjunction, multispace0).parse(text).map_err(|error| {
            let rest = text[error.offset()..].trim();
            if rest.is_empty() {
                "the expression ends too early".to_owned()
            } else {
                format!("the expression cannot be read from `{rest}` on")
            }
        })?;
        let mut names = Vec::new();
        root.collect_names(&mut names);
        names.sort();
        names.dedup();
        Ok(Self { text: text.to_owned(), root, names })
    }

    /// The measurements that it reads, sorted.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Its value where `value` gives the measurements; an error where one is missing or a value on the way is not finite.
    pub fn evaluate(&self, value: &dyn Fn(&str) -> Option<f64>) -> std::result::Result<f64, RewardError> {
        if let Some(name) = self.names.iter().find(|name| value(name).is_none()) {
            return Err(RewardError::Missing(name.clone()));
        }
        self.root.evaluate(value).ok_or_else(|| {
            let known = |name: &String| Some(format!("{name} = {}", value(name)?));
            let at: Vec<String> = self.names.iter().filter_map(known).collect();
            RewardError::NotFinite { expression: self.text.clone(), at: at.join(", ") }
        })
    }
}

impl Node {
    fn collect_names(&self, names: &mut Vec<String>) {
        match self {
            Self::Number(_) => {}
            Self::Measurement(name) => names.push(name.clone()),
            Self::Unary(_, inner) => inner.collect_names(names),
            Self::Binary(_, left, right) => {
                left.collect_names(names);
                right.collect_names(names);
            }
        }
    }

    /// The value, or `None` where this node or one below it is not finite.
    fn evaluate(&self, value: &dyn Fn(&str) -> Option<f64>) -> Option<f64> {
        let result = match self {
            Self::Number(number) => *number,
            Self::Measurement(name) => value(name)?,
            Self::Unary(apply, inner) => apply(inner.evaluate(value)?),
            Self::Binary(apply, left, right) => apply(left.evaluate(value)?, right.evaluate(value)?),
        };
        result.is_finite().then_some(result)
    }

    fn binary(apply: fn(f64, f64) -> f64) -> impl FnOnce(Self, Self) -> Self {
        move |left, right| Self::Binary(apply, Box::new(left), Box::new(right))
    }
}

fn truth(value: bool) -> f64 {
    f64::from(u8::from(value))
}

#[expect(clippy::float_cmp, reason = "whoever writes `==` means it: measurements are counts and flags")]
fn equal(left: f64, right: f64) -> bool {
    left == right
}

/// Comparisons joined by `or`, each by `and` more tightly.
fn disjunction(input: &mut &str) -> Result<Node> {
    joined(input, "or", conjunction, |left, right| truth(left != 0.0 || right != 0.0))
}

fn conjunction(input: &mut &str) -> Result<Node> {
    joined(input, "and", comparison, |left, right| truth(left != 0.0 && right != 0.0))
}

/// One or more operands with a word between them.
fn joined(
    input: &mut &str,
    word: &'static str,
    operand: fn(&mut &str) -> Result<Node>,
    apply: fn(f64, f64) -> f64,
) -> Result<Node> {
    let mut node = operand(input)?;
    let letter = || one_of(('a'..='z', 'A'..='Z', '0'..='9', '_'));
    while let Some(right) = opt(preceded((multispace0, word, not(letter()), multispace0), operand)).parse_next(input)? {
        node = Node::binary(apply)(node, right);
    }
    Ok(node)
}

/// A sum, or two of them compared; comparisons do not chain.
fn comparison(input: &mut &str) -> Result<Node> {
    let left = arithmetic.parse_next(input)?;
    let operator = delimited(multispace0, alt(("<=", ">=", "==", "!=", "<", ">")), multispace0);
    let Some((operator, right)) = opt((operator, arithmetic)).parse_next(input)? else { return Ok(left) };
    let apply: fn(f64, f64) -> f64 = match operator {
        "<=" => |left, right| truth(left <= right),
        ">=" => |left, right| truth(left >= right),
        "==" => |left, right| truth(equal(left, right)),
        "!=" => |left, right| truth(!equal(left, right)),
        "<" => |left, right| truth(left < right),
        _ => |left, right| truth(left > right),
    };
    Ok(Node::binary(apply)(left, right))
}

fn arithmetic(input: &mut &str) -> Result<Node> {
    use Infix::{Left, Right};
    expression(operand)
        .prefix(dispatch! {terminated(one_of(['-', '+']), multispace0);
            '-' => empty.value(Prefix(3, |_: &mut _, inner| Ok(Node::Unary(|value| -value, Box::new(inner))))),
            _ => empty.value(Prefix(3, |_: &mut _, inner| Ok(inner))),
        })
        .infix(dispatch! {delimited(multispace0, any, multispace0);
            '+' => empty.value(Left(1, |_: &mut _, left, right| Ok(Node::binary(|a, b| a + b)(left, right)))),
            '-' => empty.value(Left(1, |_: &mut _, left, right| Ok(Node::binary(|a, b| a - b)(left, right)))),
            '*' => empty.value(Left(2, |_: &mut _, left, right| Ok(Node::binary(|a, b| a * b)(left, right)))),
            '/' => empty.value(Left(2, |_: &mut _, left, right| Ok(Node::binary(|a, b| a / b)(left, right)))),
            '^' => empty.value(Right(4, |_: &mut _, left, right| Ok(Node::binary(f64::powf)(left, right)))),
            _ => fail,
        })
        .parse_next(input)
}

fn operand(input: &mut &str) -> Result<Node> {
    alt((number, parenthesised, call, measurement)).parse_next(input)
}

fn number(input: &mut &str) -> Result<Node> {
    // `float` would also take a sign, `inf` and `nan`.
    peek(one_of(('0'..='9', '.'))).parse_next(input)?;
    terminated(float, not(one_of(('a'..='z', 'A'..='Z', '_', '.')))).map(Node::Number).parse_next(input)
}

fn parenthesised(input: &mut &str) -> Result<Node> {
    delimited(('(', multispace0), disjunction, (multispace0, ')')).parse_next(input)
}

fn name<'a>(input: &mut &'a str) -> Result<&'a str> {
    (one_of(('a'..='z', 'A'..='Z', '_')), take_while(0.., ('a'..='z', 'A'..='Z', '0'..='9', '_')))
        .take()
        .parse_next(input)
}

fn measurement(input: &mut &str) -> Result<Node> {
    name.map(|name: &str| Node::Measurement(name.to_owned())).parse_next(input)
}

fn call(input: &mut &str) -> Result<Node> {
    let function = terminated(name, (multispace0, '(')).parse_next(input)?;
    let comma = (multispace0, ',');
    let arguments: Vec<Node> =
        terminated(separated(1.., preceded(multispace0, disjunction), comma), (multispace0, ')')).parse_next(input)?;
    let fold: fn(f64, f64) -> f64 = match (function, arguments.len()) {
        ("min", 2..) => f64::min,
        ("max", 2..) => f64::max,
        ("clamp", 3) => {
            let [value, low, high] = <[Node; 3]>::try_from(arguments).expect("there are three arguments");
            return Ok(Node::binary(f64::min)(Node::binary(f64::max)(value, low), high));
        }
        (function, 1) => {
            let apply: fn(f64) -> f64 = match function {
                "abs" => f64::abs,
                "sqrt" => f64::sqrt,
                "exp" => f64::exp,
                "ln" => f64::ln,
                "floor" => f64::floor,
                "ceil" => f64::ceil,
                _ => return fail.parse_next(input),
            };
            let inner = arguments.into_iter().next().expect("there is one argument");
            return Ok(Node::Unary(apply, Box::new(inner)));
        }
        _ => return fail.parse_next(input),
    };
    let folded = arguments.into_iter().reduce(|left, right| Node::binary(fold)(left, right));
    Ok(folded.expect("there are two arguments or more"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> f64 {
        let compiled = Expression::compile(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let of = |name: &str| [("x", 3.0), ("max_x", 7.0), ("order", 0.0)].into_iter().find(|one| one.0 == name);
        compiled.evaluate(&|name| of(name).map(|one| one.1)).unwrap()
    }

    #[test]
    fn operators_bind_and_group_as_people_read_them() {
        for (text, wanted) in [
            ("8 - 4 - 2", 2.0),
            ("8 - 4 + 2", 6.0),
            ("8 / 4 / 2", 1.0),
            ("8 / 4 * 2", 4.0),
            ("2 * 8 / 4", 4.0),
            ("1 + 2 * x", 7.0),
            (" ( 1+2 )*x ", 9.0),
            ("2 * x ^ 2", 18.0),
            ("2 ^ 3 ^ 2", 512.0),
            ("-x ^ 2", -9.0),
            ("2 ^ -1", 0.5),
            ("-x + 5", 2.0),
            ("2 - -x", 5.0),
            ("2 * -x", -6.0),
            ("min(x, 1) + 1", 2.0),
            ("1 + max(x, 1) * 2", 7.0),
            ("2 * max(x - 1, 1) / 4", 1.0),
            ("abs(-x) + sqrt(4) + exp(0) + ln(1)", 6.0),
            ("min(max(x, 0), 1)", 1.0),
            ("1 - max(0, min(1, x))", 0.0),
            ("min(5, 4, x, 9)", 3.0),
            ("max_x", 7.0),
            ("1e-3 * x", 0.003),
            ("2.5E+1", 25.0),
            (".5 * x", 1.5),
            ("x > 2", 1.0),
            ("(x >= 4) + (x <= 3) * 0.5", 0.5),
            ("1 + x < 4", 0.0),
            ("x == 3", 1.0),
            ("x != 3", 0.0),
            ("x > 5 or x < 4 and max_x == 7", 1.0),
            ("(x < 4 or x > 5) and max_x > 7", 0.0),
            ("x and max_x", 1.0),
            ("order or order", 0.0),
            ("0.5 * (x and 1) + 0.25", 0.75),
            ("clamp(x, 0, 1)", 1.0),
            ("clamp(-x, -2, 1) + clamp(x, 2, 4)", 1.0),
            ("floor(-x / 2) + ceil(x / 2)", 0.0),
        ] {
            assert!((value(text) - wanted).abs() < 1e-12, "{text} = {} and not {wanted}", value(text));
        }
    }

    #[test]
    fn names_are_listed_once_and_no_constant_takes_one_away() {
        assert_eq!(Expression::compile("b * a + b + E + inf").unwrap().names(), ["E", "a", "b", "inf"]);
    }

    #[test]
    fn what_cannot_be_read_is_shown() {
        let says = |text: &str, words: &str| {
            let error = Expression::compile(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        };
        says("1 +", "ends too early");
        says("(x", "from `(x` on");
        says("x x", "from `x` on");
        says("x @ 2", "from `@ 2` on");
        says("1 < 2 < 3", "from `< 3` on");
        says("x and", "from `and` on");
        says("x android", "from `android` on");
        says(&"x".repeat(501), "501 characters");
        for text in [
            "2x",
            "1.2.3",
            "min(x)",
            "min()",
            "abs(1, 2)",
            "clamp(x, 1)",
            "or x",
            "x = 3",
            "foo(x)",
            "x ** 2",
            "1e999x",
            ")",
            "1,2",
            "é",
        ] {
            assert!(Expression::compile(text).is_err(), "{text} is taken");
        }
    }

    #[test]
    fn the_deepest_expressions_are_read_without_running_out_of_stack() {
        assert!(Expression::compile(&"(".repeat(LONGEST)).is_err());
        let nested = "(".repeat(DEEPEST) + "x" + &")".repeat(DEEPEST);
        assert_eq!(value(&nested).to_bits(), 3f64.to_bits());
        assert_eq!(value(&("-".repeat(498) + "x")).to_bits(), 3f64.to_bits());
        assert_eq!(value(&("1^".repeat(249) + "x")).to_bits(), 1f64.to_bits());
    }
}
