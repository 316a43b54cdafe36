package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/talkingdata/oam-docker-ipam/conf"
	"github.com/talkingdata/oam-docker-ipam/engine"
	"github.com/talkingdata/oam-docker-ipam/lease"
	"github.com/talkingdata/oam-docker-ipam/metrics"
	"github.com/talkingdata/oam-docker-ipam/server"
)

// Keys of the settings, in the configuration file and the environment.
const (
	keyDebug      = "IPAM_DEBUG"
	keyServers    = "DHCP_SERVER"
	keyInterface  = "DHCP_INTERFACE"
	keyListenAddr = "LISTEN_ADDR"
	keyListenPort = "LISTEN_PORT"
	keyDriverName = "DRIVER_NAME"
	keySocket     = "PLUGIN_SOCKET"
	keyDataDir    = "DATA_DIR"
	keyTimeout    = "DHCP_TIMEOUT"
	keyDocker     = "DOCKER"
	keyLogFormat  = "LOG_FORMAT"
	keyMetrics    = "METRICS_ADDR"

	keyClientID          = "CLIENT_ID"
	keyReleaseDelay      = "RELEASE_DELAY"
	keyOnLeaseLost       = "ON_LEASE_LOST"
	keyConflictCheck     = "CONFLICT_CHECK"
	keyConflictInterface = "CONFLICT_INTERFACE"
)

// optionKeys are those that a network may set for itself, as --ipam-opt in lower
// case.
var optionKeys = []string{
	keyServers, keyInterface, keyListenAddr, keyListenPort,
	keyClientID, keyReleaseDelay, keyOnLeaseLost, keyConflictCheck, keyConflictInterface,
}

// flagName is a key as a flag.
func flagName(key string) string { return strings.ReplaceAll(strings.ToLower(key), "_", "-") }

// optionName is a key as an option of a network.
func optionName(key string) string { return strings.ToLower(key) }

// keyed is a flag of a setting: a flag beats the environment, which beats the
// file. T, C and V are those of cli.FlagBase.
type keyed[T any, C any, V cli.ValueCreator[T, C]] struct {
	*cli.FlagBase[T, C, V]
	key string
	// isTyped: its value is from the command line. The values of its sources
	// don't come through Set.
	isTyped bool
	// isWrong: what its source has can't be read. That is for commands that need
	// the setting, see readSettings.
	isWrong bool
}

// ofKey makes a flag the one of a key.
func ofKey[T any, C any, V cli.ValueCreator[T, C]](file *conf.File, key string, flag *cli.FlagBase[T, C, V]) cli.Flag {
	flag.Sources = cli.NewValueSourceChain(variable(key), file.Key(key))
	return &keyed[T, C, V]{FlagBase: flag, key: key}
}

// Set takes a value from the command line (cli.Flag).
func (f *keyed[T, C, V]) Set(name, value string) error {
	f.isTyped, f.isWrong = true, false
	return f.FlagBase.Set(name, value)
}

// PostParse takes a value from the sources, where none is from the command line
// (cli.Flag).
func (f *keyed[T, C, V]) PostParse() error {
	f.isWrong = f.FlagBase.PostParse() != nil
	return nil
}

// wrong is what the setting should be, "" where it is.
func (f *keyed[T, C, V]) wrong() (want string) {
	if !f.isWrong {
		return ""
	}
	if _, isTime := f.Get().(time.Duration); isTime {
		return "a time such as 30s"
	}
	return "true or false"
}

// typed reports whether the flag was.
func (f *keyed[T, C, V]) typed() bool { return f.isTyped }

// setting is the flag's value, and where it came from.
func (f *keyed[T, C, V]) setting() server.Setting {
	s := server.Setting{Key: f.key, Value: fmt.Sprint(f.Get()), Source: "default"}
	text, source, found := f.Sources.LookupWithSource()
	if f.isWrong {
		s.Value = text
	}
	switch {
	case f.isTyped:
		s.Source = "flag --" + f.Name
	case found:
		s.Source = source.(interface{ Where() string }).Where()
	}
	return s
}

// settingFlag is what every keyed flag is, whatever its type.
type settingFlag interface {
	cli.Flag
	typed() bool
	wrong() (want string)
	setting() server.Setting
}

// settingFlags are the program's flags of settings, in their order.
func settingFlags(root *cli.Command) (flags []settingFlag) {
	for _, flag := range root.Flags {
		if f, ok := flag.(settingFlag); ok {
			flags = append(flags, f)
		}
	}
	return flags
}

// typed reports whether the flag of a key was typed on the command line.
func typed(cmd *cli.Command, key string) bool {
	return slices.ContainsFunc(settingFlags(cmd.Root()), func(f settingFlag) bool { return f.setting().Key == key && f.typed() })
}

// knownKeys are those of all settings.
func knownKeys(root *cli.Command) (keys []string) {
	for _, f := range settingFlags(root) {
		keys = append(keys, f.setting().Key)
	}
	return keys
}

// inForce lists every setting with its value and where that came from.
func inForce(cmd *cli.Command) (settings []server.Setting) {
	for _, f := range settingFlags(cmd.Root()) {
		s := f.setting()
		if s.Key == keySocket {
			s.Value = socket(cmd)
		}
		settings = append(settings, s)
	}
	return settings
}

// textOf is the setting of a key, which is there.
func textOf(settings []server.Setting, key string) server.Setting {
	return settings[slices.IndexFunc(settings, func(s server.Setting) bool { return s.Key == key })]
}

// variable is an environment variable as a source of a flag's value
// (cli.ValueSource). As in the file, an empty one counts as not set: systemd
// makes such variables of a file's empty values.
type variable string

// Lookup returns the variable's value.
func (v variable) Lookup() (string, bool) {
	value := os.Getenv(string(v))
	return value, value != ""
}

// Where names the source.
func (v variable) Where() string { return "environment variable " + string(v) }

// String names the source in error messages.
func (v variable) String() string { return v.Where() }

// GoString is String, as cli.ValueSource asks for it.
func (v variable) GoString() string { return v.String() }

// IsFromEnv makes the help text name the variable (cli.EnvValueSource).
func (v variable) IsFromEnv() bool { return true }

// Key is the variable's name.
func (v variable) Key() string { return string(v) }

// settings are the daemon's, checked.
type settings struct {
	debug     bool
	logFormat logFormat
	global    lease.Options
	driver    string
	socket    string
	dataDir   string
	docker    string
	timeout   time.Duration
	metrics   metrics.Addr
	// texts are all of them as their user wrote them, in the flags' order.
	texts []server.Setting
	// unknown are the keys of the configuration file that are no settings.
	unknown []conf.Key
}

// driverNames are those that make a file name and that Docker takes.
var driverNames = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

func readSettings(cmd *cli.Command, file *conf.File) (settings, error) {
	if err := file.Err(); err != nil {
		return settings{}, err
	}
	s := settings{
		debug: cmd.Bool("debug"), logFormat: logFormat(cmd.String("log-format")), driver: cmd.String("driver-name"), socket: socket(cmd),
		dataDir: cmd.String("data-dir"), docker: cmd.String("docker"), timeout: cmd.Duration("dhcp-timeout"),
		texts: inForce(cmd), unknown: file.Unknown(knownKeys(cmd.Root())),
	}
	wrong := func(key, want string) error {
		text := textOf(s.texts, key)
		return fmt.Errorf("configuration: %s: %s=%q: want %s", text.Source, key, text.Value, want)
	}
	for _, f := range settingFlags(cmd.Root()) {
		if want := f.wrong(); want != "" {
			return settings{}, wrong(f.setting().Key, want)
		}
	}
	var err error
	s.global, err = globalOptions(cmd, optionTexts(cmd))
	if err != nil {
		return settings{}, err
	}
	if _, err := engine.New(s.docker); err != nil {
		return settings{}, fmt.Errorf("configuration: %s: %w", textOf(s.texts, keyDocker).Source, err)
	}
	if s.metrics, err = metrics.ParseAddr(cmd.String("metrics-addr")); err != nil {
		return settings{}, fmt.Errorf("configuration: %s: %w", textOf(s.texts, keyMetrics).Source, err)
	}
	switch {
	case s.dataDir == "":
		return settings{}, wrong(keyDataDir, "a folder")
	case !driverNames.MatchString(s.driver):
		return settings{}, wrong(keyDriverName, "letters, digits, dots, hyphens and underscores")
	case !filepath.IsAbs(s.socket):
		return settings{}, wrong(keySocket, "an absolute path such as /run/docker/plugins/talkingdata.sock")
	case s.timeout <= 0:
		return settings{}, wrong(keyTimeout, "a time above zero such as 30s")
	case !slices.Contains(logFormats, s.logFormat):
		return settings{}, wrong(keyLogFormat, "auto, text or json")
	}
	return s, nil
}

// optionTexts are the settings that a network may set too, by its names for
// them.
func optionTexts(cmd *cli.Command) map[string]string {
	texts := map[string]string{}
	for _, key := range optionKeys {
		texts[optionName(key)] = cmd.String(flagName(key))
	}
	return texts
}

// globalOptions are those that apply where a network has none, by its names for
// them.
func globalOptions(cmd *cli.Command, texts map[string]string) (lease.Options, error) {
	servers, iface := texts[optionName(keyServers)], texts[optionName(keyInterface)]
	settings := inForce(cmd)
	if servers != "" && iface != "" {
		return lease.Options{}, fmt.Errorf("configuration: %s=%s (%s) and %s=%s (%s) exclude each other: the servers are asked as a relay agent or by broadcast; take one out (single networks may have --ipam-opt %s= or %s=)",
			keyServers, servers, textOf(settings, keyServers).Source, keyInterface, iface, textOf(settings, keyInterface).Source, optionName(keyServers), optionName(keyInterface))
	}
	// Each by itself, so that the error says where it is.
	for _, key := range optionKeys {
		name := optionName(key)
		if _, err := lease.ParseOptions(map[string]string{name: texts[name]}); err != nil {
			return lease.Options{}, fmt.Errorf("configuration: %s: %w", textOf(settings, key).Source, err)
		}
	}
	return lease.ParseOptions(texts)
}

// socket is the path of the plugin socket, all of the settings that operator
// commands need.
func socket(cmd *cli.Command) string {
	if path := cmd.String("socket"); path != "" {
		return path
	}
	return "/run/docker/plugins/" + cmd.String("driver-name") + ".sock"
}

// socketOf is the path of a driver's socket: Docker knows a driver by its file's
// name.
func (s settings) socketOf(d lease.Driver) string {
	path, cut := strings.CutSuffix(s.socket, ".sock")
	path += strings.TrimPrefix(d.Name, s.driver)
	if cut {
		path += ".sock"
	}
	return path
}

// reloadable reports whether a reload brings a setting into force.
func reloadable(key string) bool { return key == keyDebug || slices.Contains(optionKeys, key) }

// config prints every setting and where it came from: those that a start would
// have, or with --running those that the daemon has. With --check it prints
// nothing but what is wrong.
func config(ctx context.Context, cmd *cli.Command, file *conf.File, stdout, stderr io.Writer) error {
	s, err := readSettings(cmd, file)
	if err != nil {
		return err
	}
	texts := s.texts
	if cmd.Bool("running") {
		if texts, err = server.Settings(ctx, s.socket); err != nil {
			return err
		}
	}
	for _, key := range s.unknown {
		fmt.Fprintf(stderr, "oam-docker-ipam: %s: unknown key %s\n", key.Where(), key.Name())
	}
	switch {
	case cmd.Bool("check"):
		return nil
	case cmd.Bool("json"):
		return printJSON(stdout, texts)
	}
	t := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "KEY\tVALUE\tFROM")
	for _, text := range texts {
		fmt.Fprintf(t, "%s\t%s\t%s\n", text.Key, text.Value, text.Source)
	}
	return t.Flush()
}
