#Requires -Version 5.1
<#
.SYNOPSIS
Serve a model behind an OpenAI-compatible API.

.DESCRIPTION
Makes a virtual environment if there is none, installs llm_distill into it and starts the server. What is left out here
is taken from the environment, and what is not there either is chosen by the server. Ctrl-C stops it; answers that are
being written may end.

.PARAMETER Model
A folder with a model, a GGUF file, or a hub name like owner/name. Left out: HF_MODEL of the environment.

.PARAMETER Address
Where to listen. 127.0.0.1, which the server takes by itself, is for this machine alone; beyond it the server wants a key.

.PARAMETER Port
The port; 0 takes any free one.

.PARAMETER Device
cpu or cuda.

.PARAMETER Dtype
float32, bfloat16 or float16.

.PARAMETER BatchSize
Answers that are written at the same time, at most.

.PARAMETER MaxConcurrent
Requests that run or wait, at most; more are told to come back later.

.PARAMETER MaxModelLen
Tokens of prompt and answer together.

.PARAMETER LogLevel
debug, info, warning, error or critical.

.PARAMETER AskKey
Ask for the key that clients have to send. Without this switch it is LLM_DISTILL_API_KEY of the environment.

.PARAMETER Venv
The folder of the virtual environment.

.PARAMETER Extras
Extras of the package to install, e.g. demo,lora.

.PARAMETER Update
Install again, though it is installed.

.EXAMPLE
.\serve.ps1 -Model C:\models\student

.EXAMPLE
.\serve.ps1 -Model C:\models\student -Address 0.0.0.0 -AskKey
#>
[CmdletBinding()]
param(
    [Parameter(Position = 0)]
    [string]$Model,

    [string]$Address,

    [ValidateRange(0, 65535)]
    [Nullable[int]]$Port,

    [string]$Device,

    [ValidateSet('float32', 'bfloat16', 'float16')]
    [string]$Dtype,

    [ValidateRange(1, 65536)]
    [Nullable[int]]$BatchSize,

    [ValidateRange(1, 1000000)]
    [Nullable[int]]$MaxConcurrent,

    [ValidateRange(1, 100000000)]
    [Nullable[int]]$MaxModelLen,

    [ValidateSet('debug', 'info', 'warning', 'error', 'critical')]
    [string]$LogLevel,

    [switch]$AskKey,

    [ValidateNotNullOrEmpty()]
    [string]$Venv = (Join-Path ([Environment]::GetFolderPath('LocalApplicationData')) 'llm_distill\venv'),

    [string]$Extras,

    [switch]$Update
)

Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'
$PSNativeCommandUseErrorActionPreference = $false

# What the server reads from its environment, by the parameter that sets it.
$Names = [ordered]@{
    Model         = 'HF_MODEL'
    Address       = 'HOST'
    Port          = 'PORT'
    Device        = 'DEVICE'
    Dtype         = 'TORCH_DTYPE'
    BatchSize     = 'BATCH_SIZE'
    MaxConcurrent = 'MAX_CONCURRENT'
    MaxModelLen   = 'MAX_MODEL_LEN'
    LogLevel      = 'LOGLEVEL'
}

function Find-Python {
    # The command of a Python that is new enough, as a list of words.
    foreach ($words in @('py', '-3'), @('python3'), @('python')) {
        if (-not (Get-Command -Name $words[0] -CommandType Application -ErrorAction SilentlyContinue)) { continue }
        $rest = @($words | Select-Object -Skip 1)
        & $words[0] @rest -c 'import sys; sys.exit(sys.version_info < (3, 10))' | Out-Null
        if ($LASTEXITCODE -eq 0) { return , $words }
    }
    throw 'no Python 3.10 or newer was found; install one from python.org or the Microsoft Store and start again'
}

function Invoke-Checked {
    # Run a program and stop where it fails.
    param([string]$What, [string]$Program, [string[]]$Words)
    & $Program @Words | Out-Host
    if ($LASTEXITCODE -ne 0) { throw "$What failed with exit code $LASTEXITCODE; what it said is above" }
}

function Install-Server {
    # The path of llm-distill.exe, in a virtual environment that is made and filled where it is not there yet.
    param([string]$Folder, [string]$With, [bool]$Again)
    $python = Join-Path $Folder 'Scripts\python.exe'
    $program = Join-Path $Folder 'Scripts\llm-distill.exe'
    if (-not (Test-Path -LiteralPath $python)) {
        Write-Host "making a virtual environment in $Folder"
        $found = Find-Python
        $rest = @($found | Select-Object -Skip 1) + @('-m', 'venv', $Folder)
        Invoke-Checked -What 'making the virtual environment' -Program $found[0] -Words $rest
    }
    if ($Again -or -not (Test-Path -LiteralPath $program)) {
        $source = Split-Path -Parent (Split-Path -Parent $PSScriptRoot)
        $words = @('-m', 'pip', 'install', '--upgrade')
        $what = 'llm_distill'
        if (Test-Path -LiteralPath (Join-Path $source 'settings.ini')) {
            $what = $source
            $words += @('-c', (Join-Path $source 'constraints.txt'))
        }
        if ($With) { $what = '{0}[{1}]' -f $what, $With }
        Write-Host "installing $what"
        Invoke-Checked -What 'the installation' -Program $python -Words ($words + $what)
    }
    if (-not (Test-Path -LiteralPath $program)) { throw "the installation left no $program; try again with -Update" }
    return $program
}

function Start-Server {
    # Run the server until it ends or Ctrl-C, which reaches it too, for it shares this console. Its exit code.
    param([string]$Program)
    $server = Start-Process -FilePath $Program -ArgumentList 'serve' -NoNewWindow -PassThru
    $null = $server.Handle  # without this its exit code cannot be read later
    try {
        while (-not $server.WaitForExit(300)) { }
        return $server.ExitCode
    }
    finally {
        if (-not $server.HasExited -and -not $server.WaitForExit(15000)) { Stop-Process -Id $server.Id -Force }
    }
}

$before = @{}
try {
    if ([Environment]::OSVersion.Platform -ne 'Win32NT') { throw 'this script is for Windows; elsewhere: llm-distill serve' }
    foreach ($name in $Names.Keys) {
        if (-not $PSBoundParameters.ContainsKey($name)) { continue }
        $before[$Names[$name]] = [Environment]::GetEnvironmentVariable($Names[$name])
        [Environment]::SetEnvironmentVariable($Names[$name], [string]$PSBoundParameters[$name])
    }
    if (-not $env:HF_MODEL) { throw 'no model: give -Model a folder, a GGUF file or a hub name, or set HF_MODEL' }
    if ($AskKey) {
        $secret = Read-Host -Prompt 'the key that clients have to send' -AsSecureString
        $before['LLM_DISTILL_API_KEY'] = $env:LLM_DISTILL_API_KEY
        $env:LLM_DISTILL_API_KEY = [Net.NetworkCredential]::new('', $secret).Password
    }
    $code = Start-Server -Program (Install-Server -Folder $Venv -With $Extras -Again $Update.IsPresent)
}
catch {
    [Console]::Error.WriteLine("serve.ps1: $($_.Exception.Message)")
    $code = 1
}
finally {
    foreach ($name in $before.Keys) {
        if ($null -eq $before[$name]) { Remove-Item -Path "Env:$name" -ErrorAction SilentlyContinue }
        else { [Environment]::SetEnvironmentVariable($name, $before[$name]) }
    }
}
exit $code
