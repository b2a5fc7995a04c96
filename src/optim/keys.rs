//! A section of a config whose keys belong to several owners, each a struct in its own file: they
//! stand side by side in the section, and every error names its key.
//!
//! (serde's `flatten` would do, if it did not forget the path of a key and let unknown ones pass.)

use std::fmt;

use serde::de::{self, DeserializeOwned, Deserializer, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};

/// The keys of a section that nobody has taken yet, and those that are known so far.
pub struct Keys {
    table: toml::Table,
    known: Vec<&'static str>,
}

impl Keys {
    /// A whole section.
    pub fn read<'de, D: Deserializer<'de>>(section: D) -> Result<Keys, D::Error> {
        Ok(Keys { table: toml::Table::deserialize(section)?, known: Vec::new() })
    }

    /// The keys of one owner, a struct.
    pub fn take<T: DeserializeOwned, E: de::Error>(&mut self) -> Result<T, E> {
        let names = names::<T>();
        self.known.extend(names);
        let mut own = toml::Table::new();
        for name in names {
            if let Some(value) = self.table.remove(*name) {
                own.insert((*name).to_owned(), value);
            }
        }

        serde_path_to_error::deserialize(toml::Value::Table(own)).map_err(|error| {
            let (path, message) =
                (error.path().to_string(), error.inner().message().trim().to_owned());
            E::custom(format!("key `{path}`: {message}"))
        })
    }

    /// The keys of one owner if it is `asked`; else those that are there are set aside, each with
    /// its value.
    pub fn take_if<T: DeserializeOwned + Default, E: de::Error>(
        &mut self,
        asked: bool,
        set_aside: impl FnOnce(Vec<(String, String)>),
    ) -> Result<T, E> {
        if asked {
            return self.take();
        }

        let names = names::<T>();
        self.known.extend(names);
        let there = names
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), self.table.remove(*name)?.to_string())));
        set_aside(there.collect());
        Ok(T::default())
    }

    /// Nothing may be left.
    pub fn finish<E: de::Error>(self) -> Result<(), E> {
        let Some(unknown) = self.table.keys().next() else { return Ok(()) };
        let known: Vec<String> = self.known.iter().map(|name| format!("`{name}`")).collect();
        Err(E::custom(format!(
            "key `{unknown}`: unknown field `{unknown}`, expected one of {}",
            known.join(", ")
        )))
    }
}

/// The names of a struct's fields, as they are deserialised.
pub fn names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    let _ = T::deserialize(Names(&mut names)); // It ends when it has told them.
    names
}

struct Names<'a>(&'a mut &'static [&'static str]);

/// That the names are told.
#[derive(Debug)]
struct Told;

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("names of fields only")
    }
}

impl std::error::Error for Told {}

impl de::Error for Told {
    fn custom<T: fmt::Display>(_: T) -> Told {
        Told
    }
}

impl<'de> Deserializer<'de> for Names<'_> {
    type Error = Told;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Told> {
        *self.0 = fields;
        Err(Told)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Told> {
        Err(Told)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
